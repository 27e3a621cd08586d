// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moeops::bench {

// The MoE layer of a model.
struct Problem {
  std::string name;
  int64_t hidden;
  int64_t intermediate;
  int64_t experts;
  int64_t top_k;
  int64_t shared_experts;
};

// A name out of bench/problems, or a JSON file of the same form. Throws tools::Error.
Problem load_problem(const std::string& name_or_file);
// The names, sorted.
std::vector<std::string> problem_names();

// One of a layer's two GEMMs: y [rows, n] = x [rows, k] times an expert's [n, k].
struct Gemm {
  const char* name;  // w13 or w2
  int64_t n;
  int64_t k;
};
std::vector<Gemm> gemms_of(const Problem& problem);

// "1,8,64", "1-2048*2" (doubling), "64-256+64", or any of them with commas between. Throws
// tools::Error, whose message begins with `option`.
std::vector<int64_t> parse_list(const std::string& option, const std::string& text);

}  // namespace moeops::bench

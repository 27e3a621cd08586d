// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/gating_top_k.h>

#include <cstdint>
#include <string>
#include <vector>

namespace moeops::bench {

// How a model's router chooses; the fields are those of GatingTopKArgs.
struct Gating {
  GatingScore score = GatingScore::kSoftmax;
  bool bias = false;
  int64_t group_count = 1;
  int64_t k_group = 1;
  GroupSelect group_select = GroupSelect::kMax;
  bool renormalize = false;
  float routed_scaling_factor = 1.0f;
};

// The MoE layer of a model.
struct Problem {
  std::string name;  // or the file, as it was asked for
  int64_t hidden;
  int64_t intermediate;
  int64_t experts;
  int64_t top_k;
  int64_t shared_experts;
  Gating gating = {};
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

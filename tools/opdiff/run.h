// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tools/opdiff/call.h"
#include "tools/opdiff/compare.h"

namespace moeops::tools {

struct OutputVerdict {
  std::string name;
  Comparison comparison;
};

// What came of one case under one implementation.
struct Verdict {
  std::string case_name;
  std::string op;
  Impl impl = Impl::kRef;
  bool passed = false;
  std::string message;                 // why it failed, or the status that it had to return
  std::vector<OutputVerdict> outputs;  // stages first, in the order of the computation
};

// Replays a case and compares. `first`: how many mismatches to keep for each output. Throws Error
// when the case cannot be replayed (an unknown operator, parameter, input or output).
Verdict run_case(const Case& c, Impl impl, Context& context, int first);

// Runs the reference on inputs made at random and keeps its outputs as the expected ones. Throws
// Error when the operator refuses them.
Case make_case(const std::string& op, const nlohmann::json& params,
               const std::map<std::string, int64_t>& dims, DType dtype, uint64_t seed);

std::string to_text(const Verdict& verdict);
nlohmann::json to_json(const Verdict& verdict);

}  // namespace moeops::tools

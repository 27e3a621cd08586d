// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tools/opdiff/compare.h"
#include "tools/tensor_file/safetensors.h"
#include "tools/tensor_file/tensor.h"

namespace moeops::tools {

// One call of one operator, as a file holds it: inputs, parameters, expected outputs.
struct Case {
  using Tensors = std::vector<std::pair<std::string, Tensor>>;  // in the file's order

  std::string name;  // for messages: the file
  std::string op;
  nlohmann::json params = nlohmann::json::object();
  Tensors inputs;   // without their "in."
  Tensors outputs;  // without their "out."
  std::map<std::string, Tolerance> tolerance;
  std::string expect_error;  // a status; outputs is then empty
  std::string source;

  const Tensor* input(const std::string& tensor) const;
  const Tensor* output(const std::string& tensor) const;
};

// Throw Error when the file is no case.
Case read_case(const std::string& path);
Case case_of(const SafetensorsFile& file, const std::string& name);
void write_case(const std::string& path, const Case& c);

}  // namespace moeops::tools

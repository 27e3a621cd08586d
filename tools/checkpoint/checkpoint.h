// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "tools/tensor_file/safetensors.h"
#include "tools/tensor_file/tensor.h"

namespace moeops::tools {

// A model's folder as Hugging Face has it: config.json, and its tensors in model.safetensors or in
// the shards that model.safetensors.index.json names.
//
// FP8 models are refused: the file format's reader has no such type, and packing no such source.
class Checkpoint {
 public:
  // Reads config and index; a shard is opened, and checked, when a tensor of it is first asked for.
  static Checkpoint open(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }
  const nlohmann::json& config() const { return config_; }
  // nullptr if there is none. An Error if its shard is unsound or has no such tensor.
  const TensorRef* find(const std::string& name);
  // An Error if there is none.
  const TensorRef& get(const std::string& name);

 private:
  Checkpoint() = default;

  const SafetensorsFile& shard(const std::string& file);

  std::filesystem::path folder_;
  nlohmann::json config_;
  std::map<std::string, std::string> shard_of_;  // by tensor; empty without an index
  std::map<std::string, SafetensorsFile> shards_;
};

}  // namespace moeops::tools

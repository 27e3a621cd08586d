// SPDX-License-Identifier: Apache-2.0
#include "tools/checkpoint/checkpoint.h"

#include <fmt/format.h>

#include "tools/tensor_file/error.h"
#include "tools/tensor_file/mapped_file.h"
#include "tools/tensor_file/strict_json.h"

namespace moeops::tools {

namespace fs = std::filesystem;

namespace {

constexpr const char* kOneFile = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

nlohmann::json read_object(const fs::path& path) {
  const MappedFile file = MappedFile::open(path);
  nlohmann::json json = parse_strict_json(
      {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, path.string());
  if (!json.is_object()) throw Error(fmt::format("{}: expected a JSON object", path.string()));
  return json;
}

}  // namespace

Checkpoint Checkpoint::open(const fs::path& folder) {
  Checkpoint checkpoint;
  checkpoint.folder_ = folder;
  const fs::path config = folder / "config.json";
  checkpoint.config_ = read_object(config);
  if (const auto it = checkpoint.config_.find("quantization_config");
      it != checkpoint.config_.end() && it->is_object() && it->contains("quant_method") &&
      (*it)["quant_method"] == "fp8") {
    throw Error(fmt::format(
        "{}: quantization_config.quant_method is \"fp8\": FP8 weights are not supported; expected "
        "F32, BF16, F16, or I8 with a scale per channel",
        config.string()));
  }

  const fs::path index = folder / kIndex;
  if (!fs::exists(index)) return checkpoint;
  const nlohmann::json json = read_object(index);
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object()) {
    throw Error(
        fmt::format("{}: field weight_map: expected an object of file names", index.string()));
  }
  for (const auto& [name, file] : map->items()) {
    // A name only: an index must not reach out of its folder.
    if (!file.is_string() || file.get<std::string>().empty() ||
        fs::path(file.get<std::string>()).filename() != file.get<std::string>()) {
      throw Error(fmt::format("{}: weight_map: {} is {}, expected the name of a file beside it",
                              index.string(), in_quotes(name), in_quotes(file.dump())));
    }
    checkpoint.shard_of_.emplace(name, file.get<std::string>());
  }
  if (checkpoint.shard_of_.empty()) {
    throw Error(fmt::format("{}: weight_map names no tensor", index.string()));
  }
  return checkpoint;
}

const SafetensorsFile& Checkpoint::shard(const std::string& file) {
  const auto it = shards_.find(file);
  if (it != shards_.end()) return it->second;
  return shards_.emplace(file, SafetensorsFile::open(folder_ / file)).first->second;
}

const TensorRef* Checkpoint::find(const std::string& name) {
  if (shard_of_.empty()) return shard(kOneFile).find(name);
  const auto it = shard_of_.find(name);
  if (it == shard_of_.end()) return nullptr;
  const TensorRef* tensor = shard(it->second).find(name);
  if (tensor == nullptr) {
    throw Error(fmt::format("{}: no tensor {}, which {} says is there",
                            (folder_ / it->second).string(), in_quotes(name), kIndex));
  }
  return tensor;
}

const TensorRef& Checkpoint::get(const std::string& name) {
  const TensorRef* tensor = find(name);
  if (tensor == nullptr) {
    throw Error(fmt::format("{}: no tensor {}", folder_.string(), in_quotes(name)));
  }
  return *tensor;
}

}  // namespace moeops::tools

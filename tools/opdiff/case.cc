// SPDX-License-Identifier: Apache-2.0
#include "tools/opdiff/case.h"

#include <fmt/format.h>

#include "tools/tensor_file/error.h"
#include "tools/tensor_file/strict_json.h"

namespace moeops::tools {

namespace {

const Tensor* find(const Case::Tensors& tensors, const std::string& name) {
  for (const auto& [key, tensor] : tensors) {
    if (key == name) return &tensor;
  }
  return nullptr;
}

std::string metadata(const SafetensorsFile& file, const char* key) {
  const auto it = file.metadata().find(key);
  return it == file.metadata().end() ? std::string() : it->second;
}

// As case-format.md spells it; parse_tolerance reads it back.
nlohmann::json tolerance_json(const Tolerance& tolerance) {
  if (const auto* close = std::get_if<Close>(&tolerance)) {
    return {{"rtol", close->relative}, {"atol", close->absolute}};
  }
  if (const auto* off = std::get_if<OffByOne>(&tolerance)) return {{"off_by_one", off->fraction}};
  const int64_t ulps = std::get<WithinUlps>(tolerance).ulps;
  if (ulps == 0) return {{"exact", true}};
  return {{"ulp", ulps}};
}

}  // namespace

const Tensor* Case::input(const std::string& tensor) const { return find(inputs, tensor); }
const Tensor* Case::output(const std::string& tensor) const { return find(outputs, tensor); }

Case case_of(const SafetensorsFile& file, const std::string& name) {
  Case c;
  c.name = name;
  c.op = metadata(file, "op");
  c.expect_error = metadata(file, "expect_error");
  c.source = metadata(file, "source");
  if (c.op.empty()) throw Error(fmt::format("{}: no case: the metadata has no \"op\"", name));
  if (const std::string params = metadata(file, "params"); !params.empty()) {
    c.params = parse_strict_json(params, name + ": params");
  }
  for (const NamedTensor& entry : file.tensors()) {
    if (entry.name.starts_with("in.")) {
      c.inputs.emplace_back(entry.name.substr(3), Tensor(entry.tensor));
    } else if (entry.name.starts_with("out.")) {
      c.outputs.emplace_back(entry.name.substr(4), Tensor(entry.tensor));
    } else {
      throw Error(fmt::format("{}: tensor {} is neither in.<name> nor out.<name>", name,
                              in_quotes(entry.name)));
    }
  }
  if (!c.expect_error.empty() && !c.outputs.empty()) {
    throw Error(fmt::format("{}: has both expect_error and expected outputs", name));
  }
  if (c.expect_error.empty() && c.outputs.empty()) {
    throw Error(fmt::format("{}: has neither expected outputs nor expect_error", name));
  }
  if (const std::string text = metadata(file, "tolerance"); !text.empty()) {
    c.tolerance = parse_tolerance(name, text);
  }
  for (const auto& [output, tolerance] : c.tolerance) {
    if (c.output(output) == nullptr) {
      throw Error(fmt::format("{}: tolerance names {}, which is no expected output", name,
                              in_quotes(output)));
    }
  }
  return c;
}

Case read_case(const std::string& path) { return case_of(SafetensorsFile::open(path), path); }

void write_case(const std::string& path, const Case& c) {
  SafetensorsFile::Metadata metadata = {
      {"op", c.op}, {"params", c.params.dump()}, {"source", c.source}};
  nlohmann::json tolerance = nlohmann::json::object();
  for (const auto& [name, value] : c.tolerance) tolerance[name] = tolerance_json(value);
  if (c.expect_error.empty()) {
    metadata["tolerance"] = tolerance.dump();
  } else {
    metadata["expect_error"] = c.expect_error;
  }
  std::vector<NamedTensor> tensors;
  for (const auto& [name, tensor] : c.inputs) tensors.push_back({"in." + name, tensor.ref()});
  for (const auto& [name, tensor] : c.outputs) tensors.push_back({"out." + name, tensor.ref()});
  write_safetensors(path, metadata, tensors);
}

}  // namespace moeops::tools

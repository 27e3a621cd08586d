// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tools/tensor_file/mapped_file.h"
#include "tools/tensor_file/tensor.h"

namespace moeops::tools {

// A .safetensors file: 8 bytes of header length (little-endian), a JSON header, the tensors' bytes.
//
// A file that opens is sound through and through: every tensor lies inside the file, in bytes of
// its own that are as many as its shape says, all bytes belong to a tensor, and a BOOL is 0 or 1.
class SafetensorsFile {
 public:
  using Metadata = std::map<std::string, std::string>;

  static SafetensorsFile open(const std::filesystem::path& path);
  // Borrows `bytes`; `name` is what errors call them.
  static SafetensorsFile parse(std::string_view name, std::span<const std::byte> bytes);

  const Metadata& metadata() const { return metadata_; }
  // In the order of the header, which is the order in which writers were given them.
  const std::vector<NamedTensor>& tensors() const { return tensors_; }
  // nullptr if there is none.
  const TensorRef* find(std::string_view name) const;

 private:
  SafetensorsFile() = default;

  std::optional<MappedFile> file_;
  Metadata metadata_;
  std::vector<NamedTensor> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
};

void write_safetensors(const std::filesystem::path& path, const SafetensorsFile::Metadata& metadata,
                       std::span<const NamedTensor> tensors);

}  // namespace moeops::tools

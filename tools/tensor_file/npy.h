// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string_view>

#include "tools/tensor_file/mapped_file.h"
#include "tools/tensor_file/tensor.h"

namespace moeops::tools {

// A .npy file of NumPy, format 1, 2 or 3: one little-endian, row-major array of numbers or bools.
// Anything else NumPy can save (big-endian, column-major, objects, records) is refused by name.
class NpyFile {
 public:
  static NpyFile open(const std::filesystem::path& path);
  // Borrows `bytes`; `name` is what errors call them.
  static NpyFile parse(std::string_view name, std::span<const std::byte> bytes);

  const TensorRef& tensor() const { return tensor_; }

 private:
  NpyFile() = default;

  std::optional<MappedFile> file_;
  TensorRef tensor_;
};

// An Error for BF16, which NumPy cannot spell.
void write_npy(const std::filesystem::path& path, const TensorRef& tensor);

}  // namespace moeops::tools

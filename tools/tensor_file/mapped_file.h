// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace moeops::tools {

// A regular file mapped read-only: opening one costs the same for a kilobyte and for a checkpoint's
// shard. Whoever truncates the file meanwhile gets this process a SIGBUS, as with every mapping.
class MappedFile {
 public:
  static MappedFile open(const std::filesystem::path& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  explicit MappedFile(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::span<const std::byte> bytes_;
};

}  // namespace moeops::tools

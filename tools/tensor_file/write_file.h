// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <functional>
#include <iosfwd>
#include <string_view>

namespace moeops::tools {

// Writes beside `path` and renames, so that readers see the old file or the whole new one: on any
// error, an exception of `write` included, the old file stays and nothing is left beside it.
// A symbolic link stays one. What is no regular file, such as /dev/stdout, is written directly.
void write_file_atomically(const std::filesystem::path& path,
                           const std::function<void(std::ostream&)>& write);
void write_file_atomically(const std::filesystem::path& path, std::string_view content);

}  // namespace moeops::tools

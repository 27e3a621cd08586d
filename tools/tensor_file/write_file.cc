// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/write_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "tools/tensor_file/error.h"

namespace moeops::tools {
namespace {

namespace fs = std::filesystem;

struct RemoveOnExit {
  fs::path path;
  ~RemoveOnExit() {
    std::error_code ignored;  // there is nothing to remove once it was renamed
    fs::remove(path, ignored);
  }
};

void write_to(const fs::path& destination, const fs::path& named,
              const std::function<void(std::ostream&)>& write) {
  errno = 0;
  std::ofstream out(destination, std::ios::binary);
  if (out) {
    write(out);
    out.close();
  }
  if (!out) {
    throw Error(fmt::format("{}: cannot write: {}", named.string(), std::strerror(errno)));
  }
}

}  // namespace

void write_file_atomically(const fs::path& path, const std::function<void(std::ostream&)>& write) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::exists(status) && !fs::is_regular_file(status)) return write_to(path, path, write);

  fs::path target = fs::weakly_canonical(path, error);
  if (error) throw Error(fmt::format("{}: cannot write: {}", path.string(), error.message()));
  const RemoveOnExit temporary{target.string() + fmt::format(".{}.tmp", ::getpid())};
  write_to(temporary.path, path, write);
  fs::rename(temporary.path, target, error);
  if (error) throw Error(fmt::format("{}: cannot replace: {}", path.string(), error.message()));
}

void write_file_atomically(const fs::path& path, std::string_view content) {
  write_file_atomically(path, [content](std::ostream& out) { out << content; });
}

}  // namespace moeops::tools

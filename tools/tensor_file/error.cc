// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/error.h"

#include <fmt/format.h>

namespace moeops::tools {

std::string in_quotes(std::string_view text) {
  constexpr size_t kLongest = 100;
  std::string result = "'";
  for (char c : text.substr(0, kLongest)) {
    if (c >= 0x20 && c < 0x7F) {
      result += c;
    } else {
      result += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return result + (text.size() > kLongest ? "...'" : "'");
}

}  // namespace moeops::tools

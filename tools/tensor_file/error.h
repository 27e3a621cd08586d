// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace moeops::tools {

// Input that cannot be used, or output that cannot be written. The message is for the person at the
// terminal: the file, the field, its value and what was expected. Every main() turns it into exit
// status 2.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Text from a file, fit for a message: in quotes, unprintable bytes escaped, the middle of the
// sentence not a megabyte long.
std::string in_quotes(std::string_view text);

}  // namespace moeops::tools

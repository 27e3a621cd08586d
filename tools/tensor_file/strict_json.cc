// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/strict_json.h"

#include <fmt/format.h>

#include <set>
#include <vector>

#include "tools/tensor_file/error.h"

namespace moeops::tools {

nlohmann::json parse_strict_json(std::string_view text, const std::string& what) {
  // The parser takes a NUL for the end of its input.
  if (const size_t nul = text.find('\0'); nul != text.npos) {
    throw Error(fmt::format("{}: not JSON at byte {}: a NUL", what, nul));
  }
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int, Event event, nlohmann::json& value) {
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(value.get<std::string>()).second) {
      throw Error(fmt::format("{}: duplicate key \"{}\"", what, value.get<std::string>()));
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, watch);
  } catch (const nlohmann::json::exception& e) {
    throw Error(fmt::format("{}: not JSON: {}", what, e.what()));
  }
}

}  // namespace moeops::tools

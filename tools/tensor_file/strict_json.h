// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace moeops::tools {

// Parses JSON text; duplicate keys are an error, where a plain parse would keep the last one and
// hide the others. Throws Error, whose message begins with `what`.
nlohmann::json parse_strict_json(std::string_view text, const std::string& what);

}  // namespace moeops::tools

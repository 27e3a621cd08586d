// SPDX-License-Identifier: Apache-2.0
#include "tools/opdiff/params.h"

#include <fmt/format.h>

#include "tools/tensor_file/error.h"

namespace moeops::tools {

Params::Params(std::string where, nlohmann::json object)
    : where_(std::move(where)), object_(std::move(object)) {
  if (!object_.is_object()) throw Error(fmt::format("{}: params is not a JSON object", where_));
}

const nlohmann::json* Params::find(const char* name) {
  used_.insert(name);
  const auto it = object_.find(name);
  return it == object_.end() ? nullptr : &*it;
}

void Params::fail(const char* name, const std::string& expected) const {
  throw Error(fmt::format(
      "{}: params.{} = {}, expected {}", where_, name,
      object_.at(name).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace), expected));
}

bool Params::flag(const char* name, bool fallback) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) fail(name, "true or false");
  return value->get<bool>();
}

int64_t Params::integer(const char* name, int64_t fallback) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_number_integer() ||
      (value->is_number_unsigned() && value->get<uint64_t>() > INT64_MAX)) {
    fail(name, "an integer of 64 bits");
  }
  return value->get<int64_t>();
}

double Params::number(const char* name, double fallback) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_number()) fail(name, "a number");
  return value->get<double>();
}

std::pair<int64_t, int64_t> Params::range(const char* name, std::pair<int64_t, int64_t> fallback) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_array() || value->size() != 2 || !value->at(0).is_number_integer() ||
      !value->at(1).is_number_integer()) {
    fail(name, "two integers [begin, end]");
  }
  return {value->at(0).get<int64_t>(), value->at(1).get<int64_t>()};
}

std::string Params::text_of(const char* name, const char* fallback, const std::string& names) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_string()) fail(name, "one of " + names);
  return value->get<std::string>();
}

void Params::check_all_used() const {
  for (const auto& [name, value] : object_.items()) {
    if (!used_.contains(name)) {
      throw Error(fmt::format("{}: params.{} is not a parameter of this operator", where_, name));
    }
  }
}

}  // namespace moeops::tools

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace moeops::tools {

// An operator's parameters as a case names them. Every access checks type and range and notes the
// name, so that a parameter nobody asked for (a misspelt one) is found at the end.
class Params {
 public:
  template <class T>
  using Choices = std::vector<std::pair<const char*, T>>;

  // `where` begins every message. Throws Error when `object` is no JSON object.
  Params(std::string where, nlohmann::json object);

  bool flag(const char* name, bool fallback = false);
  int64_t integer(const char* name, int64_t fallback);
  double number(const char* name, double fallback);
  // Two integers [begin, end).
  std::pair<int64_t, int64_t> range(const char* name, std::pair<int64_t, int64_t> fallback);
  // An enumeration, spelt as a string; the first choice is the default.
  template <class T>
  T choice(const char* name, const Choices<T>& choices) {
    std::string names;
    for (const auto& [text, value] : choices)
      names += std::string(names.empty() ? "" : ", ") + text;
    const std::string given = text_of(name, choices.front().first, names);
    for (const auto& [text, value] : choices) {
      if (given == text) return value;
    }
    fail(name, "one of " + names);
  }
  bool has(const char* name) const { return object_.contains(name); }

  // Throws Error when the object has a name that was never asked for.
  void check_all_used() const;

  const nlohmann::json& json() const { return object_; }

 private:
  const nlohmann::json* find(const char* name);
  std::string text_of(const char* name, const char* fallback, const std::string& names);
  [[noreturn]] void fail(const char* name, const std::string& expected) const;

  std::string where_;
  nlohmann::json object_;
  std::set<std::string> used_;
};

}  // namespace moeops::tools

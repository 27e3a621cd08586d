// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>

#include "tools/tensor_file/error.h"
#include "tools/tensor_file/strict_json.h"

namespace moeops::bench {

namespace fs = std::filesystem;
using tools::Error;

namespace {

const fs::path kProblems = MOEOPS_PROBLEM_DIR;

int64_t size_of(const nlohmann::json& object, const std::string& file, const char* field,
                int64_t least) {
  const auto it = object.find(field);
  if (it == object.end()) throw Error(fmt::format("{}: field {} is missing", file, field));
  // Up to a million: then no product of two sizes and a few bytes overflows.
  if (!it->is_number_integer() || *it < least || *it > 1000000) {
    throw Error(fmt::format("{}: {} = {}, expected an integer in [{}, 1000000]", file, field,
                            it->dump(), least));
  }
  return it->get<int64_t>();
}

int64_t parse_positive(const std::string& option, std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > 10000000) {
    throw Error(
        fmt::format("{}: {} is not an integer in [1, 10000000]", option, tools::in_quotes(text)));
  }
  return value;
}

void check_fields(const nlohmann::json& object, const std::string& where,
                  std::initializer_list<const char*> known) {
  for (const auto& [field, value] : object.items()) {
    if (std::find(known.begin(), known.end(), field) == known.end()) {
      throw Error(fmt::format("{}: unknown field {}; expected {}", where, tools::in_quotes(field),
                              fmt::join(known, ", ")));
    }
  }
}

// True when the field holds the second of two words, false when the first or when it is missing.
bool second_of(const nlohmann::json& object, const std::string& where, const char* field,
               const char* first, const char* second) {
  const auto it = object.find(field);
  if (it == object.end() || *it == first) return false;
  if (*it == second) return true;
  throw Error(
      fmt::format("{}: {} = {}, expected {} or {}", where, field, it->dump(), first, second));
}

bool flag_of(const nlohmann::json& object, const std::string& where, const char* field) {
  const auto it = object.find(field);
  if (it == object.end()) return false;
  if (!it->is_boolean()) {
    throw Error(fmt::format("{}: {} = {}, expected true or false", where, field, it->dump()));
  }
  return it->get<bool>();
}

Gating gating_of(const nlohmann::json& object, const std::string& file, int64_t experts) {
  Gating gating;
  const auto it = object.find("gating");
  if (it == object.end()) return gating;
  const std::string where = file + ": gating";
  if (!it->is_object()) throw Error(fmt::format("{} is not a JSON object", where));
  check_fields(*it, where,
               {"score", "bias", "group_count", "k_group", "group_select", "renormalize",
                "routed_scaling_factor"});
  if (second_of(*it, where, "score", "softmax", "sigmoid")) gating.score = GatingScore::kSigmoid;
  if (second_of(*it, where, "group_select", "max", "top2_sum")) {
    gating.group_select = GroupSelect::kTop2Sum;
  }
  gating.bias = flag_of(*it, where, "bias");
  gating.renormalize = flag_of(*it, where, "renormalize");
  if (it->contains("group_count")) gating.group_count = size_of(*it, where, "group_count", 1);
  if (it->contains("k_group")) gating.k_group = size_of(*it, where, "k_group", 1);
  if (experts % gating.group_count != 0 || gating.k_group > gating.group_count) {
    throw Error(fmt::format("{}: {} of {} groups of {} experts", where, gating.k_group,
                            gating.group_count, experts));
  }
  if (const auto factor = it->find("routed_scaling_factor"); factor != it->end()) {
    if (!factor->is_number()) {
      throw Error(
          fmt::format("{}: routed_scaling_factor = {}, expected a number", where, factor->dump()));
    }
    gating.routed_scaling_factor = factor->get<float>();
  }
  return gating;
}

}  // namespace

Problem load_problem(const std::string& name_or_file) {
  fs::path path = kProblems / (name_or_file + ".json");
  if (!fs::exists(path)) path = name_or_file;
  std::ifstream file(path);
  if (!file || fs::is_directory(path)) {
    throw Error(fmt::format("--problem {}: no such file, and no problem of that name; there are {}",
                            name_or_file, fmt::join(problem_names(), ", ")));
  }
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const nlohmann::json object = tools::parse_strict_json(text, path.string());
  if (!object.is_object()) throw Error(fmt::format("{}: not a JSON object", path.string()));
  check_fields(object, path.string(),
               {"hidden", "intermediate", "experts", "top_k", "shared_experts", "gating"});
  Problem problem;
  problem.name = name_or_file;
  problem.hidden = size_of(object, path.string(), "hidden", 1);
  problem.intermediate = size_of(object, path.string(), "intermediate", 1);
  problem.experts = size_of(object, path.string(), "experts", 1);
  problem.top_k = size_of(object, path.string(), "top_k", 1);
  problem.shared_experts = size_of(object, path.string(), "shared_experts", 0);
  if (problem.top_k > problem.experts) {
    throw Error(fmt::format("{}: top_k = {} of experts = {}", path.string(), problem.top_k,
                            problem.experts));
  }
  problem.gating = gating_of(object, path.string(), problem.experts);
  return problem;
}

std::vector<std::string> problem_names() {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(kProblems)) {
    names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<Gemm> gemms_of(const Problem& problem) {
  return {{"w13", 2 * problem.intermediate, problem.hidden},
          {"w2", problem.hidden, problem.intermediate}};
}

std::vector<int64_t> parse_list(const std::string& option, const std::string& text) {
  std::vector<int64_t> values;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, comma - begin);
    begin = comma + 1;
    const size_t dash = item.find('-');
    if (dash == std::string::npos) {
      values.push_back(parse_positive(option, item));
      continue;
    }
    const size_t step_at = item.find_first_of("*+", dash);
    if (step_at == std::string::npos) {
      throw Error(fmt::format("{}: {} has no step; expected FIRST-LAST*FACTOR or FIRST-LAST+STEP",
                              option, tools::in_quotes(item)));
    }
    const int64_t first = parse_positive(option, item.substr(0, dash));
    const int64_t last = parse_positive(option, item.substr(dash + 1, step_at - dash - 1));
    const int64_t step = parse_positive(option, item.substr(step_at + 1));
    const bool multiply = item[step_at] == '*';
    if (first > last || (multiply && step < 2)) {
      throw Error(fmt::format("{}: {} does not lead from the first to the last value", option,
                              tools::in_quotes(item)));
    }
    for (int64_t value = first; value <= last; value = multiply ? value * step : value + step) {
      values.push_back(value);
    }
  }
  if (values.size() > 1000) throw Error(fmt::format("{}: more than 1000 values", option));
  return values;
}

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
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
  for (const auto& [field, value] : object.items()) {
    static constexpr const char* kFields[] = {"hidden", "intermediate",   "experts",
                                              "top_k",  "shared_experts", "gating"};
    if (std::find(std::begin(kFields), std::end(kFields), field) == std::end(kFields)) {
      throw Error(fmt::format("{}: unknown field {}; expected {}", path.string(),
                              tools::in_quotes(field), fmt::join(kFields, ", ")));
    }
  }
  Problem problem;
  problem.name = path.stem().string();
  problem.hidden = size_of(object, path.string(), "hidden", 1);
  problem.intermediate = size_of(object, path.string(), "intermediate", 1);
  problem.experts = size_of(object, path.string(), "experts", 1);
  problem.top_k = size_of(object, path.string(), "top_k", 1);
  problem.shared_experts = size_of(object, path.string(), "shared_experts", 0);
  if (problem.top_k > problem.experts) {
    throw Error(fmt::format("{}: top_k = {} of experts = {}", path.string(), problem.top_k,
                            problem.experts));
  }
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

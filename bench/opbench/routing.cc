// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/routing.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <numeric>
#include <random>

#include "tools/tensor_file/error.h"

namespace moeops::bench {

using tools::Error;

namespace {

// One token a line: its experts, with commas between. Throws Error.
std::vector<std::vector<int64_t>> read_trace(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Error(fmt::format("--routing trace:{}: cannot be read", path));
  std::vector<std::vector<int64_t>> tokens;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    const auto where = [&] { return fmt::format("{}:{}", path, tokens.size() + 1); };
    std::vector<int64_t> experts;
    for (size_t begin = 0; begin <= line.size();) {
      const size_t comma = std::min(line.find(',', begin), line.size());
      int64_t expert = 0;
      const char* end = line.data() + comma;
      const auto [stop, error] = std::from_chars(line.data() + begin, end, expert);
      if (error != std::errc() || stop != end || expert < 0) {
        throw Error(fmt::format("{}: {} is not an expert's number", where(),
                                tools::in_quotes(line.substr(begin, comma - begin))));
      }
      experts.push_back(expert);
      begin = comma + 1;
    }
    if (!tokens.empty() && experts.size() != tokens.front().size()) {
      throw Error(fmt::format("{}: {} experts, but the first token has {}", where(), experts.size(),
                              tokens.front().size()));
    }
    tokens.push_back(std::move(experts));
  }
  if (tokens.empty()) throw Error(fmt::format("{}: a trace of no tokens", path));
  return tokens;
}

}  // namespace

Routing::Routing(const std::string& text) : text_(text) {
  const size_t colon = text.find(':');
  const std::string kind = text.substr(0, colon);
  const std::string rest = colon == std::string::npos ? "" : text.substr(colon + 1);
  const auto number = [&](double low, double high) {
    double value = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
    if (error != std::errc() || end != rest.data() + rest.size() || !(value >= low) ||
        !(value <= high)) {
      throw Error(fmt::format("--routing {}: expected a number in [{}, {}] after {}:", text, low,
                              high, kind));
    }
    return value;
  };
  if (text == "uniform") {
    kind_ = Kind::kUniform;
  } else if (text == "balanced") {
    kind_ = Kind::kBalanced;
  } else if (kind == "zipf") {
    kind_ = Kind::kZipf;
    parameter_ = number(0, 10);
  } else if (kind == "hot") {
    kind_ = Kind::kHot;
    parameter_ = number(0, 1);
  } else if (kind == "trace" && !rest.empty()) {
    kind_ = Kind::kTrace;
    file_ = rest;
    trace_ = read_trace(rest);
  } else {
    throw Error(
        fmt::format("--routing {}: expected uniform, balanced, zipf:S, hot:F or trace:FILE", text));
  }
}

std::vector<int32_t> Routing::expert_ids(int64_t tokens, int64_t experts, int64_t top_k,
                                         uint64_t seed) const {
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(tokens * top_k));
  if (kind_ == Kind::kTrace) {
    if (static_cast<int64_t>(trace_.front().size()) != top_k) {
      throw Error(fmt::format("{}: {} experts a token, but the problem has top_k = {}", file_,
                              trace_.front().size(), top_k));
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const size_t line = static_cast<size_t>(t) % trace_.size();
      for (const int64_t expert : trace_[line]) {
        if (expert >= experts) {
          throw Error(fmt::format("{}:{}: expert {}, but the problem has {}", file_, line + 1,
                                  expert, experts));
        }
        ids.push_back(static_cast<int32_t>(expert));
      }
    }
    return ids;
  }
  if (kind_ == Kind::kBalanced) {
    for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
      ids.push_back(static_cast<int32_t>(slot % experts));
    }
    return ids;
  }

  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> unit(0, 1);
  // Expert i is chosen in proportion to its weight; which expert is the popular one is drawn too.
  std::vector<double> log_weight(static_cast<size_t>(experts));
  if (kind_ == Kind::kZipf) {
    std::vector<int64_t> rank(log_weight.size());
    std::iota(rank.begin(), rank.end(), 1);
    std::shuffle(rank.begin(), rank.end(), random);
    for (size_t i = 0; i < rank.size(); ++i) {
      log_weight[i] = -parameter_ * std::log(static_cast<double>(rank[i]));
    }
  }
  const size_t hot = random() % log_weight.size();
  std::vector<std::pair<double, size_t>> keys(log_weight.size());
  for (int64_t t = 0; t < tokens; ++t) {
    // The top_k largest of log-weight plus Gumbel noise are a draw without replacement.
    for (size_t i = 0; i < keys.size(); ++i) {
      keys[i] = {log_weight[i] - std::log(-std::log(unit(random))), i};
    }
    if (kind_ == Kind::kHot) {
      // A fraction of the tokens has the hot expert among its choices, the others have not.
      keys[hot].first = unit(random) < parameter_ ? INFINITY : -INFINITY;
    }
    std::nth_element(keys.begin(), keys.begin() + (top_k - 1), keys.end(), std::greater<>());
    for (int64_t k = 0; k < top_k; ++k) {
      ids.push_back(static_cast<int32_t>(keys[static_cast<size_t>(k)].second));
    }
  }
  return ids;
}

std::vector<int64_t> Routing::rows_per_expert(int64_t tokens, int64_t experts, int64_t top_k,
                                              uint64_t seed) const {
  std::vector<int64_t> rows(static_cast<size_t>(experts));
  for (const int32_t id : expert_ids(tokens, experts, top_k, seed)) ++rows[static_cast<size_t>(id)];
  return rows;
}

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#include "tools/opdiff/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <type_traits>
#include <utility>

#include "tools/tensor_file/error.h"
#include "tools/tensor_file/strict_json.h"

namespace moeops::tools {
namespace {

// Numbers the values of a type in ascending order, neighbours by neighbouring integers and both
// zeros by 0, so that a difference of ordinals counts ULPs.
template <class T>
int64_t ordinal(T value) {
  if constexpr (std::is_integral_v<T>) {
    return value;
  } else {
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t,
                                    std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;
    const int64_t bits = std::bit_cast<Bits>(value);
    return bits >= 0 ? bits : int64_t{std::numeric_limits<Bits>::min()} - bits;
  }
}

uint64_t distance(int64_t a, int64_t b) {
  const uint64_t difference = static_cast<uint64_t>(a) - static_cast<uint64_t>(b);
  return a >= b ? difference : -difference;
}

// The largest value seen and the first place where it was.
struct Peak {
  double value = 0;
  int64_t at = -1;

  void see(double candidate, int64_t i) {
    if (candidate > value) *this = {candidate, i};
  }
};

std::vector<int64_t> unravel(int64_t i, const std::vector<int64_t>& shape) {
  std::vector<int64_t> index(shape.size());
  for (size_t d = shape.size(); d-- > 0; i /= shape[d]) index[d] = i % shape[d];
  return index;
}

// Which elements are off by one is decided by how many are: turns the fraction into a limit that
// holds element by element.
template <class T>
WithinUlps resolve(const OffByOne& tolerance, const TensorRef& expected, const TensorRef& got,
                   int64_t count) {
  int64_t ones = 0;
  for (int64_t i = 0; i < count; ++i) {
    ones += distance(ordinal(load<T>(got, i)), ordinal(load<T>(expected, i))) == 1;
  }
  const double allowed = tolerance.fraction * static_cast<double>(count);
  return static_cast<double>(ones) <= allowed ? WithinUlps{1} : kExact;
}

template <class T>
void compare_as(const TensorRef& expected, const TensorRef& got, int64_t count,
                int64_t max_mismatches, Comparison& result) {
  constexpr bool kFloating = !std::is_integral_v<T>;
  Tolerance limit = result.tolerance;
  if (const auto* off_by_one = std::get_if<OffByOne>(&limit)) {
    limit = resolve<T>(*off_by_one, expected, got, count);
  }

  Peak absolute, relative, ulps;
  double sum_dd = 0, sum_ee = 0, sum_gg = 0, sum_ge = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T raw_g = load<T>(got, i);
    const T raw_e = load<T>(expected, i);
    const double g = to_f64(raw_g);
    const double e = to_f64(raw_e);
    const uint64_t steps = distance(ordinal(raw_g), ordinal(raw_e));
    bool equal = steps == 0;
    bool within = false;
    if (!std::isfinite(g) || !std::isfinite(e)) {
      equal = equal || (std::isnan(g) && std::isnan(e));
      result.nonfinite += !equal;
    } else {
      // The distance of integers is exact where their doubles are not.
      const double difference = kFloating ? std::abs(g - e) : static_cast<double>(steps);
      if (const auto* close = std::get_if<Close>(&limit)) {
        within = difference <= close->absolute + close->relative * std::abs(e);
      } else {
        within = steps <= static_cast<uint64_t>(std::get<WithinUlps>(limit).ulps);
      }
      absolute.see(difference, i);
      if (e != 0) relative.see(difference / std::abs(e), i);
      if (kFloating) ulps.see(static_cast<double>(steps), i);
      sum_dd += difference * difference;
      sum_ee += e * e;
      sum_gg += g * g;
      sum_ge += g * e;
    }
    result.differing += !equal;
    if (equal || within) continue;
    ++result.beyond;
    if (std::ssize(result.mismatches) < max_mismatches) {
      result.mismatches.push_back(
          {unravel(i, expected.shape), element_text(got, i), element_text(expected, i)});
    }
  }

  const auto largest = [&](const Peak& peak) -> std::optional<Comparison::Largest> {
    if (peak.at < 0) return std::nullopt;
    return Comparison::Largest{peak.value, unravel(peak.at, expected.shape)};
  };
  result.absolute = largest(absolute);
  result.relative = largest(relative);
  result.ulps = largest(ulps);
  if (sum_dd > 0) {  // else 0 and 1, all-zero tensors included
    result.relative_rms = std::sqrt(sum_dd / sum_ee);
    const bool one_is_zero = sum_ee == 0 || sum_gg == 0;
    result.cosine = one_is_zero ? 0 : sum_ge / std::sqrt(sum_ee) / std::sqrt(sum_gg);
  }
  result.pass = result.beyond == 0;
}

// `where` begins every message.
double parse_number(const std::string& where, const nlohmann::json& object, const char* key,
                    double largest) {
  const nlohmann::json& value = object.at(key);
  if (!value.is_number() || value < 0 || value > largest) {
    throw Error(fmt::format("{}: {} is {}, expected a number in [0, {}]", where, key,
                            in_quotes(value.dump()), largest));
  }
  return value.get<double>();
}

Tolerance parse_one(const std::string& where, const nlohmann::json& json) {
  constexpr double kUnlimited = std::numeric_limits<double>::max();
  if (json.is_object() && json.size() == 1) {
    if (json.contains("exact") && json["exact"] == true) return kExact;
    if (json.contains("ulp") && json["ulp"].is_number_integer()) {
      return WithinUlps{static_cast<int64_t>(parse_number(where, json, "ulp", 0x1p53))};
    }
    if (json.contains("off_by_one")) return OffByOne{parse_number(where, json, "off_by_one", 1)};
  }
  if (json.is_object() && json.size() == 2 && json.contains("rtol") && json.contains("atol")) {
    return Close{parse_number(where, json, "rtol", kUnlimited),
                 parse_number(where, json, "atol", kUnlimited)};
  }
  throw Error(
      fmt::format("{} is {}, expected {{\"exact\": true}}, {{\"rtol\": r, \"atol\": a}}, "
                  "{{\"ulp\": integer}} or {{\"off_by_one\": fraction}}",
                  where, in_quotes(json.dump())));
}

std::string largest_text(const char* what, const std::optional<Comparison::Largest>& largest) {
  if (!largest) return fmt::format("{} 0", what);
  return fmt::format("{} {:.3g} at {}", what, largest->value, shape_text(largest->index));
}

nlohmann::json largest_json(const std::optional<Comparison::Largest>& largest) {
  if (!largest) return nullptr;
  return {{"value", largest->value}, {"index", largest->index}};
}

}  // namespace

std::string to_string(const Tolerance& tolerance) {
  if (const auto* close = std::get_if<Close>(&tolerance)) {
    return fmt::format("rtol {} atol {}", close->relative, close->absolute);
  }
  if (const auto* off_by_one = std::get_if<OffByOne>(&tolerance)) {
    return fmt::format("off by one in at most {} of the places", off_by_one->fraction);
  }
  const int64_t ulps = std::get<WithinUlps>(tolerance).ulps;
  return ulps == 0 ? "exact" : fmt::format("{} ulp", ulps);
}

Tolerance default_tolerance(FileDType dtype) {
  if (!is_floating(dtype)) return kExact;
  return Close{.relative = 1e-5, .absolute = 1e-6};
}

std::map<std::string, Tolerance> parse_tolerance(std::string_view file, std::string_view json) {
  const std::string where = fmt::format("{}: metadata 'tolerance'", file);
  const nlohmann::json document = parse_strict_json(json, where);
  if (!document.is_object()) {
    throw Error(fmt::format("{} is {}, expected an object", where, in_quotes(document.dump())));
  }
  std::map<std::string, Tolerance> result;
  for (const auto& [output, tolerance] : document.items()) {
    result.emplace(output, parse_one(fmt::format("{} of {}", where, in_quotes(output)), tolerance));
  }
  return result;
}

Comparison compare(const TensorRef& expected, const TensorRef& got, const Tolerance& tolerance,
                   int64_t max_mismatches) {
  Comparison result;
  result.tolerance = tolerance;
  if (got.dtype != expected.dtype) {
    result.message =
        fmt::format("dtype is {}, expected {}", to_string(got.dtype), to_string(expected.dtype));
    return result;
  }
  if (got.shape != expected.shape) {
    result.message =
        fmt::format("shape is {}, expected {}", shape_text(got.shape), shape_text(expected.shape));
    return result;
  }
  if (std::holds_alternative<OffByOne>(tolerance) && is_floating(expected.dtype)) {
    result.message = fmt::format("the tolerance off_by_one is for integers, not for {}",
                                 to_string(expected.dtype));
    return result;
  }
  result.count = expected.numel();
  visit_type(expected.dtype, [&]<class T>(std::type_identity<T>) {
    compare_as<T>(expected, got, result.count, max_mismatches, result);
  });
  return result;
}

std::string to_text(std::string_view name, const Comparison& comparison) {
  std::string text =
      fmt::format("{} {}: {}\n", comparison.pass ? "PASS" : "FAIL", name,
                  !comparison.message.empty()
                      ? comparison.message
                      : fmt::format("{} of {} values beyond tolerance ({})", comparison.beyond,
                                    comparison.count, to_string(comparison.tolerance)));
  if (!comparison.message.empty()) return text;
  text += fmt::format(
      "  {} differ, {} of them NaN or infinite; largest error: {}, {}, {}; "
      "relative rms {:.3g}, cosine {:.9g}\n",
      comparison.differing, comparison.nonfinite, largest_text("absolute", comparison.absolute),
      largest_text("relative", comparison.relative), largest_text("ulp", comparison.ulps),
      comparison.relative_rms, comparison.cosine);
  for (const Comparison::Mismatch& mismatch : comparison.mismatches) {
    text += fmt::format("  {}: got {}, expected {}\n", shape_text(mismatch.index), mismatch.got,
                        mismatch.expected);
  }
  return text;
}

void to_json(nlohmann::json& json, const Comparison& comparison) {
  nlohmann::json mismatches = nlohmann::json::array();
  for (const Comparison::Mismatch& mismatch : comparison.mismatches) {
    // As text: JSON has no NaN, and many readers no 64-bit integers.
    mismatches.push_back(
        {{"index", mismatch.index}, {"got", mismatch.got}, {"expected", mismatch.expected}});
  }
  json = {{"pass", comparison.pass},
          {"message", comparison.message},
          {"tolerance", to_string(comparison.tolerance)},
          {"count", comparison.count},
          {"differing", comparison.differing},
          {"beyond_tolerance", comparison.beyond},
          {"nonfinite", comparison.nonfinite},
          {"largest_absolute", largest_json(comparison.absolute)},
          {"largest_relative", largest_json(comparison.relative)},
          {"largest_ulp", largest_json(comparison.ulps)},
          {"relative_rms", comparison.relative_rms},
          {"cosine", comparison.cosine},
          {"mismatches", std::move(mismatches)}};
}

}  // namespace moeops::tools

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tools/tensor_file/tensor.h"

namespace moeops::tools {

// How far an element may be from the expected one. NaN matches NaN, an infinity the same infinity
// and -0 matches 0, whatever the tolerance.

// At most so many representable values of the tensor's dtype away; integers count in ones.
struct WithinUlps {
  int64_t ulps;
};
inline constexpr WithinUlps kExact{0};

// |got - expected| <= absolute + relative * |expected|
struct Close {
  double relative;
  double absolute;
};

// Integers that may be off by one in at most this fraction of the places, and by more nowhere.
struct OffByOne {
  double fraction;
};

using Tolerance = std::variant<WithinUlps, Close, OffByOne>;

std::string to_string(const Tolerance& tolerance);

// What holds for an output that its case says nothing about.
Tolerance default_tolerance(FileDType dtype);

// A case's "tolerance" metadata (case-format.md): output name -> tolerance. `file` is for errors.
std::map<std::string, Tolerance> parse_tolerance(std::string_view file, std::string_view json);

struct Comparison {
  struct Largest {
    double value;
    std::vector<int64_t> index;
  };
  struct Mismatch {
    std::vector<int64_t> index;
    std::string got;
    std::string expected;
  };

  bool pass = false;
  std::string message;  // why the tensors could not be compared by value; empty if they were
  Tolerance tolerance;
  int64_t count = 0;      // elements compared
  int64_t differing = 0;  // not equal
  int64_t beyond = 0;     // of these, beyond the tolerance
  int64_t nonfinite = 0;  // of these, where a NaN or an infinity faces something else

  // All below is over the places where both values are finite; a figure is absent where nothing
  // differs.
  std::optional<Largest> absolute;
  std::optional<Largest> relative;  // |got - expected| / |expected|, where expected is not 0
  std::optional<Largest> ulps;      // floating-point dtypes only
  double relative_rms = 0;          // sqrt(sum (got - expected)^2 / sum expected^2)
  double cosine = 1;

  std::vector<Mismatch> mismatches;  // the first of those beyond the tolerance
};

Comparison compare(const TensorRef& expected, const TensorRef& got, const Tolerance& tolerance,
                   int64_t max_mismatches = 10);

// For people: a line of verdict, one of figures, the mismatches.
std::string to_text(std::string_view name, const Comparison& comparison);

void to_json(nlohmann::json& json, const Comparison& comparison);

}  // namespace moeops::tools

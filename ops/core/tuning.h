// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>
#include <moeops/ops/core/status.h>

#include <array>
#include <compare>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace moeops {

// The calls that share a tuned plan: one kernel, weights of one form, about as many rows. An array
// holds the kernel's name, so that looking a shape up allocates nothing.
struct TunedShape {
  using Name = std::array<char, 24>;  // zeros behind it
  static Name name_of(std::string_view text);
  static int64_t row_class(int64_t rows);  // the power of two that holds them
  static int64_t row_class_of_expert(int64_t rows, int64_t experts);  // of the mean

  Isa isa = Isa::kScalar;  // of the context, like the threads
  int threads = 1;
  DType dtype = DType::kNone;  // of the weights
  Name kernel = {};
  int64_t panels = 1;    // of an expert
  int64_t k_chunks = 1;  // of a panel
  int64_t rows = 1;      // most that the call may have, as a row class
  int64_t rows_per_expert = 1;

  auto operator<=>(const TunedShape&) const = default;
};

// The numbers of a grouped_matmul plan. All 0: not tuned.
struct TunedPlan {
  int64_t chunk_rows = 0;
  int64_t k_block = 0;
  int64_t task_panels = 0;

  bool operator==(const TunedPlan&) const = default;
};

// A tuning cache. Its file is text: a line that names the library's version and the processor, one
// that counts the plans, and a line for each.
struct Tuning {
  std::map<TunedShape, TunedPlan> plans;

  // Null where the shape is not tuned.
  const TunedPlan* find(const TunedShape& shape) const noexcept;

  // The file's text, on this machine.
  std::string text() const;
  // The inverse, of exactly what text() gives: anything else, and so a text of another machine or
  // version, is an invalid_argument that says what is wrong, and *tuning is unchanged.
  static Status parse(const std::string& text, Tuning* tuning);
  // The same of a regular file.
  static Status read(const char* path, Tuning* tuning) noexcept;
};

}  // namespace moeops

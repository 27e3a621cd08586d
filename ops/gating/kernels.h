// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/machine.h>
#include <moeops/ops/gating_top_k.h>

#include <cstdint>

namespace moeops::gating_internal {

// Arrays in scratch have room for whole registers of any ISA.
inline constexpr int64_t kPad = 16;

// What is known before any data is touched.
struct Plan {
  int64_t tokens;
  int64_t experts;
  int64_t group_count;
  int64_t group_size;
  int64_t group_stride;  // of the keys of two groups: group_size, padded
  int64_t block;         // tokens whose scores are computed together
  int64_t row_stride;    // of the scores of two tokens

  int team;               // workers
  int64_t scratch_words;  // 32-bit, of one worker
};
Plan make_plan(const GatingTopKArgs& args, int workers);

// A worker's memory, cut out of `scratch_words`.
struct Scratch {
  float* scores;         // [block, row_stride]
  int32_t* keys;         // [group_count, group_stride] of the token at hand
  int32_t* group_keys;   // [group_count]
  int32_t* all_groups;   // [group_count]: 0, 1, 2, ...
  int32_t* kept_groups;  // [group_count]
  int32_t* candidate_keys;
  int32_t* candidate_ids;
  int32_t* order;  // the candidates' ids, best first
};
Scratch cut_scratch(const Plan& plan, void* words);

// Keys of f32 values: as signed integers they order as the values do, NaN below all of them. -0
// would be below 0, but does not occur: scores are not negative, and a sum of 0 is +0.
inline constexpr int32_t kNoKey = INT32_MIN + 1;  // below every value's, and 1 may be taken off it
inline constexpr int32_t kNanKey = INT32_MIN + 2;
inline constexpr int32_t kMinusInfinityKey = INT32_MIN + 0x7FFFFF;

namespace {  // compiled for every ISA

inline int32_t key_of(float value) {
  if (value != value) return kNanKey;
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? bits ^ INT32_MAX : bits;
}
inline float value_of(int32_t key) {
  const int32_t bits = key < 0 ? key ^ INT32_MAX : key;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

struct Kernel {
  const char* name;
  Isa isa;  // the least that it needs
  // Computes the tokens [first, last).
  void (*run)(const GatingTopKArgs& args, const Plan& plan, const Scratch& scratch, int64_t first,
              int64_t last);
};

// Every kernel of kernels.inc, best first; the last one runs everywhere.
extern const Kernel* const kKernels[];
extern const int kKernelCount;

}  // namespace moeops::gating_internal

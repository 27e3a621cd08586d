// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include "ops/grouped_matmul/vector_kernel.h"

namespace moeops::grouped_matmul_internal {

namespace {

inline __m512i read(const char* p) { return _mm512_loadu_si512(p); }
inline void write(char* p, __m512i v) { _mm512_storeu_si512(p, v); }
inline __m512i broadcast(const char* p) {
  int32_t group;
  __builtin_memcpy(&group, p, sizeof(group));
  return _mm512_set1_epi32(group);
}

// 24 accumulators, 2 or 4 vectors of weights and broadcasts in 32 registers: as many independent
// chains as two units with a latency of up to 10 want. 12 x 32 reads the weights half as often as
// 6 x 64, so that even their first time, from memory, they come fast enough.
struct Tile24 {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 12;
  static constexpr int kFewRows = 6;
  static constexpr int kTogether = 4;
  static constexpr int kParts = 1;
  // All of a block of K, as a rule: the weights come from L2 fast enough, and the fewer steps, the
  // less often sums are stored and loaded (Zen 4, from L2: 465 of 473 Gop/s; in steps of 8, 451).
  static constexpr int64_t kStepChunks = 64;
};

struct Floats : Tile24 {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load(const char* p) { return _mm512_loadu_ps(p); }
  static void store(char* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};

struct Ints : Tile24 {
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum load(const char* p) { return read(p); }
  static void store(char* p, Sum sum) { write(p, sum); }
};

}  // namespace

}  // namespace moeops::grouped_matmul_internal

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

// 24 accumulators, 4 vectors of weights and broadcasts in 32 registers: as many independent chains
// as two units with a latency of up to 10 want.
struct Tile6x64 {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 4;
  static constexpr int kRows = 6;
  static constexpr int kTogether = 4;
  static constexpr int kParts = 1;
  // 32 KiB: 6 rows can read from L2 what L1 loses of it.
  static constexpr int64_t kStepChunks = 8;
};

struct Floats : Tile6x64 {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load(const char* p) { return _mm512_loadu_ps(p); }
  static void store(char* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};

struct Ints : Tile6x64 {
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum load(const char* p) { return read(p); }
  static void store(char* p, Sum sum) { write(p, sum); }
};

}  // namespace

}  // namespace moeops::grouped_matmul_internal

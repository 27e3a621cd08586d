// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "bench/limits/dot_chains.h"
#include "bench/limits/memory_streams.h"

namespace moeops::limits {

namespace {

struct F32 {
  using Accumulator = __m256;
  using Operand = __m256;
  using Lane = float;
  static constexpr int kChains = 12;
  static constexpr int kMultiplyAdds = 8;
  static Operand left(int u) { return _mm256_set1_ps(static_cast<float>(u)); }
  static Operand right(int s) { return _mm256_set1_ps(static_cast<float>(s)); }
  static void dot(Accumulator& chain, Operand& u, Operand& s) {
    chain = _mm256_fmadd_ps(u, s, chain);
  }
};

struct S8 {
  using Accumulator = __m256i;
  using Operand = __m256i;
  using Lane = int32_t;
  static constexpr int kChains = 10;
  static constexpr int kMultiplyAdds = 32;
  static Operand left(int u) { return _mm256_set1_epi8(static_cast<char>(u)); }
  static Operand right(int s) { return _mm256_set1_epi8(static_cast<char>(s)); }
  static void dot(Accumulator& chain, Operand& u, Operand& s) {
    // Otherwise the products, all alike, are moved out of the loop.
    asm volatile("" : "+x"(u));
    const __m256i pairs = _mm256_maddubs_epi16(u, s);
    chain = _mm256_add_epi32(chain, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// Twice as wide would be no faster: 512-bit loads and stores came out some 5% slower.
struct Memory {
  using Vector = __m256i;
  static void stream(Vector* p, Vector v) { _mm256_stream_si256(p, v); }
  static void fence() { _mm_sfence(); }
};

}  // namespace

Kernels kernels_avx2() {
  return {.f32 = DotChains<F32>::kernel(),
          .bf16 = {},
          .s8 = DotChains<S8>::kernel(),
          .memory = MemoryStreams<Memory>::kernels()};
}

}  // namespace moeops::limits

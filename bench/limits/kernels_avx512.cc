// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "bench/limits/dot_chains.h"

namespace moeops::limits {

namespace {

struct F32 {
  using Accumulator = __m512;
  using Operand = __m512;
  using Lane = float;
  static constexpr int kChains = 16;
  static constexpr int kMultiplyAdds = 16;
  static Operand left(int u) { return _mm512_set1_ps(static_cast<float>(u)); }
  static Operand right(int s) { return _mm512_set1_ps(static_cast<float>(s)); }
  static void dot(Accumulator& chain, Operand& u, Operand& s) {
    chain = _mm512_fmadd_ps(u, s, chain);
  }
};

struct S8 {
  using Accumulator = __m512i;
  using Operand = __m512i;
  using Lane = int32_t;
  static constexpr int kChains = 16;
  static constexpr int kMultiplyAdds = 64;
  static Operand left(int u) { return _mm512_set1_epi8(static_cast<char>(u)); }
  static Operand right(int s) { return _mm512_set1_epi8(static_cast<char>(s)); }
  static void dot(Accumulator& chain, Operand& u, Operand& s) {
    // Otherwise the products, all alike, are moved out of the loop.
    asm volatile("" : "+v"(u));
    const __m512i pairs = _mm512_maddubs_epi16(u, s);
    chain = _mm512_add_epi32(chain, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

}  // namespace

Kernels kernels_avx512() {
  return {.f32 = DotChains<F32>::kernel(), .bf16 = {}, .s8 = DotChains<S8>::kernel(), .memory = {}};
}

}  // namespace moeops::limits

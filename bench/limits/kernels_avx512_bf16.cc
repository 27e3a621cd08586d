// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "bench/limits/dot_chains.h"

namespace moeops::limits {

namespace {

struct Bf16 {
  using Accumulator = __m512;
  using Operand = __m512bh;
  using Lane = float;
  static constexpr int kChains = 16;
  static constexpr int kMultiplyAdds = 32;
  static Operand broadcast(int value) {
    const __m512 f32 = _mm512_set1_ps(static_cast<float>(value));
    return _mm512_cvtne2ps_pbh(f32, f32);
  }
  static Operand left(int u) { return broadcast(u); }
  static Operand right(int s) { return broadcast(s); }
  static void dot(Accumulator& chain, Operand& u, Operand& s) {
    chain = _mm512_dpbf16_ps(chain, u, s);
  }
};

}  // namespace

Kernels kernels_avx512_bf16() {
  return {.f32 = {}, .bf16 = DotChains<Bf16>::kernel(), .s8 = {}, .memory = {}};
}

}  // namespace moeops::limits

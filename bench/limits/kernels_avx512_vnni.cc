// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "bench/limits/dot_chains.h"

namespace moeops::limits {

namespace {

struct S8 {
  using Accumulator = __m512i;
  using Operand = __m512i;
  using Lane = int32_t;
  static constexpr int kChains = 16;
  static constexpr int kMultiplyAdds = 64;
  static Operand left(int u) { return _mm512_set1_epi8(static_cast<char>(u)); }
  static Operand right(int s) { return _mm512_set1_epi8(static_cast<char>(s)); }
  static void dot(Accumulator& chain, Operand& u, Operand& s) {
    chain = _mm512_dpbusd_epi32(chain, u, s);
  }
};

}  // namespace

Kernels kernels_avx512_vnni() {
  return {.f32 = {}, .bf16 = {}, .s8 = DotChains<S8>::kernel(), .memory = {}};
}

}  // namespace moeops::limits

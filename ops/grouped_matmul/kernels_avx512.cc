// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/vectors_avx512.h"

namespace moeops::grouped_matmul_internal {

namespace {

struct F32 : Floats {
  using Weights = __m512;
  static Weights weights(const char* p) { return load(p); }
  static Sum dot(Sum sum, const char* x, Weights w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(broadcast(x)), w, sum);
  }
};

struct Halves {
  __m512i even, odd;
};

// Even and odd k as f32 each: a bf16 is the upper half of one.
struct Bf16 : Floats {
  static constexpr int kTogether = 2;
  static constexpr int kParts = 2;
  static constexpr int64_t kStepChunks = 8;
  using Weights = Halves;
  static Weights weights(const char* p) {
    const __m512i v = read(p);
    // Masked by nothing: GCC 12 warns of the plain form's own header.
    return {_mm512_maskz_slli_epi32(0xFFFF, v, 16), _mm512_and_si512(v, _mm512_set1_epi32(-65536))};
  }
  static void expand(const char* from, char* to) {
    const Halves x = weights(from);
    write(to, x.even);
    write(to + kChunkBytes, x.odd);
  }
  static Sum dot(Sum sum, const char* x, const Weights& w) {
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(broadcast(x)), _mm512_castsi512_ps(w.even), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(broadcast(x + kChunkBytes)),
                           _mm512_castsi512_ps(w.odd), sum);
  }
};

// Bytes 0 and 2, and 1 and 3, of a group as pairs of s16, whose products vpmaddwd adds in s32.
// (vpmaddubsw would take the bytes as they are, but saturates at 16 bits.)
struct S8 : Ints {
  static constexpr int kTogether = 2;
  static constexpr int kParts = 2;
  static constexpr int64_t kStepChunks = 8;
  using Weights = Halves;
  static Weights weights(const char* p) {
    const __m512i w = read(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  }
  static void expand(const char* from, char* to) {
    const __m512i x = read(from);
    write(to, _mm512_and_si512(x, _mm512_set1_epi16(255)));
    write(to + kChunkBytes, _mm512_srli_epi16(x, 8));
  }
  static Sum dot(Sum sum, const char* x, const Weights& w) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(broadcast(x), w.even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(broadcast(x + kChunkBytes), w.odd));
  }
};

}  // namespace

MOEOPS_VECTOR_KERNEL(kernel_f32_avx512, "avx512", F32, DType::kF32, Isa::kAvx512)
MOEOPS_VECTOR_KERNEL(kernel_bf16_avx512, "avx512", Bf16, DType::kBf16, Isa::kAvx512)
MOEOPS_VECTOR_KERNEL(kernel_s8_avx512, "avx512", S8, DType::kS8, Isa::kAvx512)

}  // namespace moeops::grouped_matmul_internal

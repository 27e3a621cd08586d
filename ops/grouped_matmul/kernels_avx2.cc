// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "ops/grouped_matmul/vector_kernel.h"

namespace moeops::grouped_matmul_internal {

namespace {

__m256i read(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
void write(char* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
__m256i broadcast(const char* p) {
  int32_t group;
  __builtin_memcpy(&group, p, sizeof(group));
  return _mm256_set1_epi32(group);
}

struct Floats {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kFewRows = 1;
  static constexpr int64_t kStepChunks = 4;  // 16 KiB
  using Sum = __m256;
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum load(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static void store(char* p, Sum sum) { _mm256_storeu_ps(reinterpret_cast<float*>(p), sum); }
};

// 12 accumulators, 2 vectors of weights and a broadcast of the 16 registers there are.
struct F32 : Floats {
  static constexpr int kRows = 6;
  static constexpr int kTogether = 2;
  static constexpr int kParts = 1;
  using Weights = __m256;
  static Weights weights(const char* p) { return load(p); }
  static Sum dot(Sum sum, const char* x, Weights w) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(broadcast(x)), w, sum);
  }
};

// Even and odd k as f32 each: a bf16 is the upper half of one.
struct Halves {
  __m256i even, odd;
};
Halves halves_bf16(__m256i v) {
  return {_mm256_slli_epi32(v, 16), _mm256_and_si256(v, _mm256_set1_epi32(-65536))};
}

struct Bf16 : Floats {
  static constexpr int kRows = 4;
  static constexpr int kTogether = 2;
  static constexpr int kParts = 2;
  using Weights = Halves;
  static Weights weights(const char* p) { return halves_bf16(read(p)); }
  static void expand(const char* from, char* to) {
    for (int i = 0; i < kChunkBytes; i += 32) {
      const Halves x = halves_bf16(read(from + i));
      write(to + i, x.even);
      write(to + kChunkBytes + i, x.odd);
    }
  }
  static Sum dot(Sum sum, const char* x, const Weights& w) {
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(broadcast(x)), _mm256_castsi256_ps(w.even), sum);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(broadcast(x + kChunkBytes)),
                           _mm256_castsi256_ps(w.odd), sum);
  }
};

// Bytes 0 and 2, and 1 and 3, of a group as pairs of s16, whose products vpmaddwd adds in s32.
// (vpmaddubsw would take the bytes as they are, but saturates at 16 bits.)
struct S8 {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kFewRows = 1;
  static constexpr int64_t kStepChunks = 4;  // 16 KiB
  static constexpr int kRows = 4;
  static constexpr int kTogether = 2;
  static constexpr int kParts = 2;
  using Sum = __m256i;
  using Weights = Halves;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum load(const char* p) { return read(p); }
  static void store(char* p, Sum sum) { write(p, sum); }
  static Weights weights(const char* p) {
    const __m256i w = read(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
  }
  static void expand(const char* from, char* to) {
    for (int i = 0; i < kChunkBytes; i += 32) {
      const __m256i x = read(from + i);
      write(to + i, _mm256_and_si256(x, _mm256_set1_epi16(255)));
      write(to + kChunkBytes + i, _mm256_srli_epi16(x, 8));
    }
  }
  static Sum dot(Sum sum, const char* x, const Weights& w) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(broadcast(x), w.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(broadcast(x + kChunkBytes), w.odd));
  }
};

}  // namespace

MOEOPS_VECTOR_KERNEL(kernel_f32_avx2, "avx2", F32, DType::kF32, Isa::kAvx2)
MOEOPS_VECTOR_KERNEL(kernel_bf16_avx2, "avx2", Bf16, DType::kBf16, Isa::kAvx2)
MOEOPS_VECTOR_KERNEL(kernel_s8_avx2, "avx2", S8, DType::kS8, Isa::kAvx2)

}  // namespace moeops::grouped_matmul_internal

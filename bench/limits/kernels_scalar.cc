// SPDX-License-Identifier: Apache-2.0
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "bench/limits/dot_chains.h"
#include "bench/limits/memory_streams.h"

namespace moeops::limits {

namespace {

// 16-byte vectors of the compiler's own kind: what every 64-bit machine has. There is no dot
// instruction among them for bf16 and s8.
struct F32 {
  typedef float Accumulator __attribute__((vector_size(16)));
  using Operand = Accumulator;
  using Lane = float;
  static constexpr int kChains = 10;
  static constexpr int kMultiplyAdds = 4;
  static Operand left(int u) { return Operand{} + static_cast<float>(u); }
  static Operand right(int s) { return Operand{} + static_cast<float>(s); }
  static void dot(Accumulator& chain, Operand& u, Operand& s) {
    // Otherwise the products, all alike, are moved out of the loop.
#if defined(__SSE2__)
    asm volatile("" : "+x"(u));
#else
    asm volatile("" : "+w"(u));  // AArch64
#endif
    chain += u * s;
  }
};

struct Memory {
  typedef int64_t Vector __attribute__((vector_size(16), may_alias));
#if defined(__SSE2__)
  static void stream(Vector* p, Vector v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
  }
  static void fence() { _mm_sfence(); }
#else
  static void stream(Vector* p, Vector v) { *p = v; }
  static void fence() {}
#endif
};

}  // namespace

Kernels kernels_scalar() {
  return {.f32 = DotChains<F32>::kernel(),
          .bf16 = {},
          .s8 = {},
          .memory = MemoryStreams<Memory>::kernels()};
}

}  // namespace moeops::limits

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace moeops::limits {

// Independent chains of one dot instruction in registers. A step lets every chain accumulate
// u * s, in each of its lanes, `multiply_adds` times altogether; run() returns the sum of all the
// accumulators after `steps`, which shows that the operations were done. It is exact while
// every accumulator stays an integer below 2^24.
struct DotKernel {
  double (*run)(int64_t steps, int u, int s) = nullptr;
  int64_t multiply_adds = 0;
};

// What a thread reads or copies: 64-byte-aligned memory that no other thread touches. It goes
// through several places side by side, a block at a time, which keeps more prefetchers busy than
// one front-to-back pass.
struct MemoryKernels {
  // Reads `bytes`, a multiple of kStreams * kBlock, in kStreams equal parts side by side. Returns
  // the bitwise or of all its 64-bit words.
  uint64_t (*read)(const void* data, int64_t bytes) = nullptr;
  // In each step reads the next `reads` units of `source` and writes the next `writes` units of
  // `target`, all of them side by side: the i-th is a copy of the (i mod reads)-th read. Returns
  // the bitwise or of what was read but not copied.
  using Copy = uint64_t (*)(const void* source, void* target, int64_t steps, int reads, int writes);
  Copy copy = nullptr;
  Copy copy_non_temporal = nullptr;
};
inline constexpr int kStreams = 4;
inline constexpr int64_t kBlock = 512;
inline constexpr int64_t kCopyUnit = 4096;  // about a row of a model's hidden state

// What one ISA adds to the ones below it; the rest is null.
struct Kernels {
  DotKernel f32;
  DotKernel bf16;
  DotKernel s8;
  MemoryKernels memory;
};

#define MOEOPS_LIMITS_KERNELS(suffix, isa) Kernels kernels_##suffix();
#include "bench/limits/kernels.inc"
#undef MOEOPS_LIMITS_KERNELS

}  // namespace moeops::limits

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "bench/limits/kernels.h"

namespace moeops::limits {

// Makes MemoryKernels of a type with
//   Vector                   an integer vector that may alias anything
//   stream(Vector*, Vector)  a non-temporal store, and fence() after the last of them
// The type lives in its ISA file's unnamed namespace, hence so does this code.
template <class Isa>
struct MemoryStreams {
  static constexpr MemoryKernels kernels() { return {read, copy<false>, copy<true>}; }

 private:
  using Vector = typename Isa::Vector;
  static constexpr int64_t kWidth = sizeof(Vector);

  static const Vector* at(const void* data, int64_t byte) {
    return reinterpret_cast<const Vector*>(static_cast<const char*>(data) + byte);
  }

  static uint64_t or_of_words(Vector seen) {
    uint64_t words[sizeof(Vector) / sizeof(uint64_t)];
    __builtin_memcpy(words, &seen, sizeof(seen));
    uint64_t all = 0;
    for (uint64_t word : words) all |= word;
    return all;
  }

  static uint64_t read(const void* data, int64_t bytes) {
    const int64_t part = bytes / kStreams;
    Vector seen = {};
    for (int64_t block = 0; block < part; block += kBlock) {
      for (int stream = 0; stream < kStreams; ++stream) {
        const Vector* p = at(data, stream * part + block);
        for (int64_t i = 0; i < kBlock / kWidth; ++i) seen |= p[i];
      }
    }
    return or_of_words(seen);
  }

  template <bool kNonTemporal>
  static uint64_t copy(const void* source, void* target, int64_t steps, int reads, int writes) {
    Vector seen = {};
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t block = 0; block < kCopyUnit; block += kBlock) {
        for (int unit = 0; unit < reads || unit < writes; ++unit) {
          const Vector* from = at(source, (step * reads + unit % reads) * kCopyUnit + block);
          if (unit >= writes) {
            for (int64_t i = 0; i < kBlock / kWidth; ++i) seen |= from[i];
            continue;
          }
          auto* to = const_cast<Vector*>(at(target, (step * writes + unit) * kCopyUnit + block));
          for (int64_t i = 0; i < kBlock / kWidth; ++i) {
            if constexpr (kNonTemporal) {
              Isa::stream(to + i, from[i]);
            } else {
              to[i] = from[i];
            }
          }
        }
      }
    }
    if constexpr (kNonTemporal) Isa::fence();
    return or_of_words(seen);
  }
};

}  // namespace moeops::limits

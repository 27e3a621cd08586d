// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace moeops {

// Cuts arrays off a block of scratch, each on a cache line of its own. Without a block it only adds
// up how large one must be, so that one function can say both:
//   Carver sizes;            lay_out(sizes);  -> sizes.bytes()
//   Carver arrays(scratch);  lay_out(arrays);
class Carver {
 public:
  explicit Carver(void* block = nullptr) : block_(static_cast<char*>(block)) {}

  // Sizes that overflow come to INT64_MAX bytes, which nothing can allocate.
  template <class T>
  T* take(int64_t rows, int64_t columns = 1) {
    T* array = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + bytes_);
    int64_t bytes = 0;
    if (__builtin_mul_overflow(rows, columns, &bytes) ||
        __builtin_mul_overflow(bytes, static_cast<int64_t>(sizeof(T)), &bytes) ||
        __builtin_add_overflow(bytes, 63, &bytes) ||
        __builtin_add_overflow(bytes_, bytes / 64 * 64, &bytes_)) {
      bytes_ = INT64_MAX;
    }
    return array;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  int64_t bytes_ = 0;
};

}  // namespace moeops

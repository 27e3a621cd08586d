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

  // The sizes must not overflow: an operator's are bounded by those of its views.
  template <class T>
  T* take(int64_t count) {
    T* array = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return array;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  int64_t bytes_ = 0;
};

}  // namespace moeops

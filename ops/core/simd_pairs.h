// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every simd_<isa>.h has of two vectors together where nothing better is known; it includes
// this at its end.

namespace moeops {
namespace {
namespace simd {

template <class T>
inline void load_two(const T* p, Vec* a, Vec* b) {
  *a = load(p);
  *b = load(p + kWidth);
}
template <class T>
inline void store_two(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kWidth, b);
}
template <class T>
inline void stream_two(T* p, Vec a, Vec b) {
  stream(p, a);
  stream(p + kWidth, b);
}

}  // namespace simd
}  // namespace
}  // namespace moeops

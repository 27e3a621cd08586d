// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/tensor.h>

#include <algorithm>

namespace moeops::ref {

// Rows as bytes, for operators that move values of any dtype unchanged.

inline char* row_bytes(const TensorView& view, int64_t i) {
  return offset(static_cast<char*>(view.data), i * view.row_stride * size_of(view.dtype));
}
inline const char* row_bytes(const ConstTensorView& view, int64_t i) {
  return offset(static_cast<const char*>(view.data), i * view.row_stride * size_of(view.dtype));
}

// to[j] = from[i]; both have one dtype and one width.
inline void copy_row(const ConstTensorView& from, int64_t i, const TensorView& to, int64_t j) {
  std::copy_n(row_bytes(from, i), from.columns() * size_of(from.dtype), row_bytes(to, j));
}

inline void zero_rows(const TensorView& view, int64_t first = 0) {
  for (int64_t i = first; i < view.rows(); ++i) {
    std::fill_n(row_bytes(view, i), view.columns() * size_of(view.dtype), char{0});
  }
}

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace moeops {

// The shape of a borrowed row-major array of 1 to 3 dimensions. Its last dimension is dense; all
// the ones before it are rows, `row_stride` elements apart: [E, N, K] is E * N rows of K.
// A default-constructed view is absent: what an optional argument is when it is not given.
struct TensorLayout {
  static constexpr int kMaxRank = 3;

  DType dtype = DType::kNone;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  int64_t row_stride = 0;  // in elements, at least the last dimension

  TensorLayout() = default;
  // A row_stride of 0 means dense.
  TensorLayout(DType type, std::initializer_list<int64_t> dims, int64_t stride = 0)
      : dtype(type), rank(static_cast<int>(dims.size())) {
    int i = 0;
    for (int64_t dim : dims) {
      if (i < kMaxRank) shape[static_cast<size_t>(i++)] = dim;
    }
    row_stride = stride != 0 || i == 0 ? stride : shape[static_cast<size_t>(i - 1)];
  }

  bool present() const { return dtype != DType::kNone; }
  int64_t dim(int i) const { return shape[static_cast<size_t>(i)]; }

  // The two below hold for layouts that passed validation (no overflow, no negative size).
  int64_t columns() const { return rank == 0 ? 0 : dim(rank - 1); }
  int64_t rows() const {
    int64_t n = rank == 0 ? 0 : 1;
    for (int i = 0; i + 1 < rank; ++i) n *= dim(i);
    return n;
  }
};

// The data of an empty view may be null, and to null nothing may be added.
template <class T>
T* offset(T* data, int64_t elements) {
  return data == nullptr ? data : data + elements;
}

// A view to write through.
struct TensorView : TensorLayout {
  void* data = nullptr;

  TensorView() = default;
  TensorView(void* pointer, const TensorLayout& layout) : TensorLayout(layout), data(pointer) {}
  template <class T>
  requires(!std::is_const_v<T> && dtype_of<T> != DType::kNone)
      TensorView(T* pointer, std::initializer_list<int64_t> dims, int64_t stride = 0)
      : TensorLayout(dtype_of<T>, dims, stride), data(pointer) {}

  template <class T>
  T* row(int64_t i) const {
    return offset(static_cast<T*>(data), i * row_stride);
  }
};

// A view to read through.
struct ConstTensorView : TensorLayout {
  const void* data = nullptr;

  ConstTensorView() = default;
  ConstTensorView(const TensorView& view) : TensorLayout(view), data(view.data) {}  // NOLINT
  ConstTensorView(const void* pointer, const TensorLayout& layout)
      : TensorLayout(layout), data(pointer) {}
  template <class T>
  requires(dtype_of<std::remove_const_t<T>> != DType::kNone)
      ConstTensorView(T* pointer, std::initializer_list<int64_t> dims, int64_t stride = 0)
      : TensorLayout(dtype_of<std::remove_const_t<T>>, dims, stride), data(pointer) {}

  template <class T>
  const T* row(int64_t i) const {
    return offset(static_cast<const T*>(data), i * row_stride);
  }
};

}  // namespace moeops

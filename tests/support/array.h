// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/tensor.h>

#include <cstring>
#include <memory>
#include <vector>

#include "tests/support/draw.h"
#include "tests/support/guarded_buffer.h"

namespace moeops::test {

// An owned array of any dtype, whose rows may have a gap between them, from its first to its last
// element between pages that may not be touched.
class Array {
 public:
  using Against = GuardedBuffer::Against;

  Array() = default;  // absent, and so are its views
  Array(DType dtype, std::initializer_list<int64_t> shape, int64_t gap = 0,
        Against side = Against::kBack)
      : Array(TensorLayout(dtype, shape), gap, side) {}
  Array(TensorLayout layout, int64_t gap, Against side) : layout_(layout), side_(side) {
    layout_.row_stride += gap;
    const int64_t rows = layout_.rows();
    const int64_t columns = layout_.columns();
    const int64_t elements =
        rows == 0 || columns == 0 ? 0 : (rows - 1) * layout_.row_stride + columns;
    memory_ = std::make_unique<GuardedBuffer>(
        static_cast<size_t>(elements * size_of(layout_.dtype)), side_);
  }
  // Of the same form, its content undefined.
  Array like() const { return present() ? Array(layout_, 0, side_) : Array(); }

  bool present() const { return memory_ != nullptr; }
  const TensorLayout& layout() const { return layout_; }
  ConstTensorView in() const {
    return present() ? ConstTensorView(data(), layout_) : ConstTensorView();
  }
  TensorView out() const { return present() ? TensorView(data(), layout_) : TensorView(); }
  char* data() const { return memory_->as<char>(); }
  size_t bytes() const { return present() ? memory_->bytes() : 0; }
  template <class T>
  T* row(int64_t i) const {
    return out().row<T>(i);
  }

  void fill(int byte) {
    if (bytes() > 0) std::memset(data(), byte, bytes());
  }
  std::vector<char> content() const {
    return present() ? std::vector<char>(data(), data() + bytes()) : std::vector<char>();
  }
  bool same_bits(const Array& other) const { return content() == other.content(); }

  // As f32; integers exactly, up to 2^24.
  float get(int64_t i, int64_t j) const {
    switch (layout_.dtype) {
      case DType::kBf16:
        return to_f32(row<bf16>(i)[j]);
      case DType::kF16:
        return to_f32(row<f16>(i)[j]);
      case DType::kS8:
        return static_cast<float>(row<int8_t>(i)[j]);
      case DType::kI32:
        return static_cast<float>(row<int32_t>(i)[j]);
      default:
        return row<float>(i)[j];
    }
  }
  void set(int64_t i, int64_t j, float value) {
    switch (layout_.dtype) {
      case DType::kBf16:
        row<bf16>(i)[j] = to_bf16(value);
        break;
      case DType::kF16:
        row<f16>(i)[j] = to_f16(value);
        break;
      case DType::kS8:
        row<int8_t>(i)[j] = static_cast<int8_t>(value);
        break;
      case DType::kI32:
        row<int32_t>(i)[j] = static_cast<int32_t>(value);
        break;
      default:
        row<float>(i)[j] = value;
        break;
    }
  }
  // Every element, gaps left alone.
  template <class Value>
  Array& set_each(Value value) {
    for (int64_t i = 0; i < layout_.rows(); ++i) {
      for (int64_t j = 0; j < layout_.columns(); ++j) set(i, j, value());
    }
    return *this;
  }
  Array& set_normal(Draw& draw, float deviation = 1.0f) {
    return set_each([&] { return deviation * draw.normal(); });
  }
  Array& set_uniform(Draw& draw, float low, float high) {
    return set_each([&] { return draw.uniform(low, high); });
  }
  Array& set_integers(Draw& draw, int64_t low, int64_t high) {
    return set_each([&] { return static_cast<float>(draw.between(low, high)); });
  }

 private:
  TensorLayout layout_;
  Against side_ = Against::kBack;
  std::unique_ptr<GuardedBuffer> memory_;
};

}  // namespace moeops::test

// SPDX-License-Identifier: Apache-2.0
#pragma once

// What property tests draw: choices, sizes, and matrices of awkward values in awkward places.

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>
#include <moeops/ops/core/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "tests/support/guarded_buffer.h"

namespace moeops::test {

// Every rung of the ladder that this machine has, lowest first.
inline std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (int i = 0; i <= static_cast<int>(machine().isa); ++i) all.push_back(static_cast<Isa>(i));
  return all;
}

struct Draw {
  explicit Draw(uint64_t seed) : random(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return *(choices.begin() + between(0, static_cast<int64_t>(choices.size()) - 1));
  }
  bool chance(int64_t one_in) { return between(1, one_in) == 1; }
  bool flag() { return between(0, 1) == 1; }
  float normal() { return distribution(random); }
  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random);
  }

  std::mt19937_64 random;
  std::normal_distribution<float> distribution;
};

// A matrix between guard pages, right against one of them (the back one gives it a start of any
// alignment), its rows `stride` elements apart. Made of the bytes 0x5A.
class GuardedMatrix {
 public:
  GuardedMatrix(DType dtype, int64_t rows, int64_t columns, int64_t stride,
                GuardedBuffer::Against side)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        stride_(stride),
        buffer_(rows == 0 || columns == 0
                    ? 0
                    : static_cast<size_t>(((rows - 1) * stride + columns) * size_of(dtype)),
                side) {
    reset();
  }

  TensorView view() const {
    return {buffer_.as<void>(), TensorLayout(dtype_, {rows_, columns_}, stride_)};
  }
  TensorView vector() const { return {buffer_.as<void>(), TensorLayout(dtype_, {columns_})}; }
  template <class T>
  T* row(int64_t i) const {
    return buffer_.as<T>() + i * stride_;
  }
  void reset() const { std::memset(buffer_.as<char>(), 0x5A, buffer_.bytes()); }
  // Everything, what lies between the rows included.
  bool same_bytes(const GuardedMatrix& other) const {
    return buffer_.bytes() == other.buffer_.bytes() &&
           std::memcmp(buffer_.as<char>(), other.buffer_.as<char>(), buffer_.bytes()) == 0;
  }

  // What lies between the rows is as it was made.
  bool gaps_untouched() const {
    for (int64_t i = 0; i + 1 < rows_ && columns_ > 0; ++i) {
      const char* from = row_bytes(i) + columns_ * size_of(dtype_);
      for (const char* p = from; p < row_bytes(i + 1); ++p) {
        if (*p != 0x5A) return false;
      }
    }
    return true;
  }

  void set(int64_t i, int64_t j, float value) const {
    if (dtype_ == DType::kF32) row<float>(i)[j] = value;
    if (dtype_ == DType::kBf16) row<bf16>(i)[j] = to_bf16(value);
    if (dtype_ == DType::kF16) row<f16>(i)[j] = to_f16(value);
  }
  float get(int64_t i, int64_t j) const {
    if (dtype_ == DType::kBf16) return to_f32(row<bf16>(i)[j]);
    if (dtype_ == DType::kF16) return to_f32(row<f16>(i)[j]);
    return row<float>(i)[j];
  }

 private:
  const char* row_bytes(int64_t i) const {
    return buffer_.as<char>() + i * stride_ * size_of(dtype_);
  }

  DType dtype_;
  int64_t rows_;
  int64_t columns_;
  int64_t stride_;
  GuardedBuffer buffer_;
};

}  // namespace moeops::test

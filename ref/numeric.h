// SPDX-License-Identifier: Apache-2.0
#pragma once

// Element access and the scalar functions of operators.md, the reference's own: nothing here is
// shared with the optimised operators.

#include <moeops/ops/core/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace moeops::ref {

// The f32 value of a 16-bit float with the given number of fraction bits, by the definition of
// the format.
inline float decode_half(uint16_t bits, int fraction_bits) {
  const int exponent_bits = 15 - fraction_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                          : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    value = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  }
  return static_cast<float>((bits & 0x8000) != 0 ? -value : value);
}

// Rounds to nearest even, by finding the unit in the last place and letting rint do it.
inline uint16_t encode_half(float x, int fraction_bits) {
  const int exponent_bits = 15 - fraction_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int infinity = ((1 << exponent_bits) - 1) << fraction_bits;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | (1 << (fraction_bits - 1)));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  int exponent = std::ilogb(magnitude);
  if (exponent < 1 - bias) exponent = 1 - bias;  // subnormals share the smallest exponent
  const int units = static_cast<int>(std::rint(std::ldexp(magnitude, fraction_bits - exponent)));
  // A normal number has its leading one in `units`; it adds 1 to the exponent field below it, and
  // so does a carry out of the fraction, up to infinity.
  const int code = ((exponent + bias - 1) << fraction_bits) + units;
  return static_cast<uint16_t>(sign | (code > infinity ? infinity : code));
}

// Row `i` of a matrix of any floating-point dtype, read and written as f32.
class FloatRow {
 public:
  FloatRow(const ConstTensorView& view, int64_t i)
      : dtype_(view.dtype),
        data_(offset(static_cast<const char*>(view.data),
                     i * view.row_stride * size_of(view.dtype))) {}

  float operator[](int64_t j) const {
    const char* p = data_ + j * size_of(dtype_);
    if (dtype_ == DType::kF32) {
      float value;
      std::memcpy(&value, p, sizeof(value));
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return decode_half(bits, dtype_ == DType::kBf16 ? 7 : 10);
  }

 private:
  DType dtype_;
  const char* data_;
};

// Writes element j of row i, rounding to the view's dtype.
inline void store(const TensorView& view, int64_t i, int64_t j, float value) {
  char* p = static_cast<char*>(view.data) + (i * view.row_stride + j) * size_of(view.dtype);
  if (view.dtype == DType::kF32) {
    std::memcpy(p, &value, sizeof(value));
  } else {
    const uint16_t bits = encode_half(value, view.dtype == DType::kBf16 ? 7 : 10);
    std::memcpy(p, &bits, sizeof(bits));
  }
}

// exp and tanh in double, rounded to f32; the rest in f32.
inline float exp(float x) { return static_cast<float>(std::exp(static_cast<double>(x))); }
inline float tanh(float x) { return static_cast<float>(std::tanh(static_cast<double>(x))); }
inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
inline float silu(float x) { return x / (1.0f + exp(-x)); }
inline float gelu_tanh(float x) {
  const float cubic = x + 0.044715f * (x * x * x);
  return 0.5f * x * (1.0f + tanh(0.7978845608028654f * cubic));  // sqrt(2 / pi)
}

// clamp(rint(v), low, 127), ties to even; NaN gives 0.
inline int8_t quantise(float v, float low) {
  if (std::isnan(v)) return 0;
  return static_cast<int8_t>(std::fmin(std::fmax(std::nearbyint(v), low), 127.0f));
}

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>

namespace moeops {

enum class DType : uint8_t { kNone = 0, kF32, kBf16, kF16, kS8, kI32, kI64, kBool };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kNone:
      return 0;
    case DType::kS8:
    case DType::kBool:
      return 1;
    case DType::kBf16:
    case DType::kF16:
      return 2;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kI64:
      return 8;
  }
  return 0;
}

constexpr const char* to_string(DType dtype) {
  switch (dtype) {
    case DType::kNone:
      return "none";
    case DType::kF32:
      return "f32";
    case DType::kBf16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kS8:
      return "s8";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kBool:
      return "bool";
  }
  return "unknown";
}

// 16-bit floating-point storage. C++20 has no such types, and the compilers' own differ.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The element type a view's pointer stands for.
template <class T>
inline constexpr DType dtype_of = DType::kNone;
template <>
inline constexpr DType dtype_of<float> = DType::kF32;
template <>
inline constexpr DType dtype_of<bf16> = DType::kBf16;
template <>
inline constexpr DType dtype_of<f16> = DType::kF16;
template <>
inline constexpr DType dtype_of<int8_t> = DType::kS8;
template <>
inline constexpr DType dtype_of<int32_t> = DType::kI32;
template <>
inline constexpr DType dtype_of<int64_t> = DType::kI64;
template <>
inline constexpr DType dtype_of<bool> = DType::kBool;

constexpr float to_f32(float x) { return x; }

constexpr float to_f32(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// Rounds to nearest even; overflow goes to infinity; a NaN keeps its sign and upper payload and
// becomes quiet.
constexpr bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((u >> 16) | 0x0040u)};
  // Adding 0x7FFF plus the lowest kept bit carries exactly when the cut part is above one half,
  // or is one half and the kept part is odd.
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

constexpr float to_f32(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinity, NaN
    const uint32_t quiet = magnitude > 0x7C00u ? 0x00400000u : 0u;
    return std::bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x03FFu) << 13) | quiet);
  }
  if (magnitude < 0x0400u) {  // zero, subnormal: an integer multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

// Rounds to nearest even; overflow goes to infinity; a NaN keeps its sign and upper payload and
// becomes quiet.
constexpr f16 to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    return {static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x03FFu))};
  }
  // 65520 = 2^16 - 2^4 lies halfway between the largest f16 and 2^16 and rounds up.
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {  // below 2^-14: the result is subnormal, a multiple of 2^-24
    // Adding 2^-1 puts the unit of the f32 sum at 2^-24; the FPU rounds to nearest even.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0x0FFFu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13))};
}

}  // namespace moeops

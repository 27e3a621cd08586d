// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace moeops::tools {

// The element types that files hold: more than the library computes with.
enum class FileDType : uint8_t { kF64, kF32, kF16, kBf16, kI64, kI32, kI16, kI8, kU8, kBool };

struct FileDTypeInfo {
  FileDType id;
  std::string_view name;  // as safetensors spells it
  int64_t size;           // bytes
  DType dtype;            // kNone: the library has no such type
};

inline constexpr std::array<FileDTypeInfo, 10> kFileDTypes = {{
    {FileDType::kF64, "F64", 8, DType::kNone},
    {FileDType::kF32, "F32", 4, DType::kF32},
    {FileDType::kF16, "F16", 2, DType::kF16},
    {FileDType::kBf16, "BF16", 2, DType::kBf16},
    {FileDType::kI64, "I64", 8, DType::kI64},
    {FileDType::kI32, "I32", 4, DType::kI32},
    {FileDType::kI16, "I16", 2, DType::kNone},
    {FileDType::kI8, "I8", 1, DType::kS8},
    {FileDType::kU8, "U8", 1, DType::kNone},
    {FileDType::kBool, "BOOL", 1, DType::kBool},
}};

constexpr const FileDTypeInfo& info(FileDType dtype) {
  return kFileDTypes[static_cast<size_t>(dtype)];
}
constexpr std::string_view to_string(FileDType dtype) { return info(dtype).name; }
constexpr int64_t size_of(FileDType dtype) { return info(dtype).size; }
constexpr DType to_dtype(FileDType dtype) { return info(dtype).dtype; }
constexpr bool is_floating(FileDType dtype) { return dtype <= FileDType::kBf16; }

constexpr std::optional<FileDType> parse_file_dtype(std::string_view name) {
  for (const FileDTypeInfo& entry : kFileDTypes) {
    if (entry.name == name) return entry.id;
  }
  return std::nullopt;
}

// Nothing for DType::kNone; every other type has a spelling.
constexpr std::optional<FileDType> to_file_dtype(DType dtype) {
  for (const FileDTypeInfo& entry : kFileDTypes) {
    if (entry.dtype == dtype && dtype != DType::kNone) return entry.id;
  }
  return std::nullopt;
}

// Bytes of a dense tensor. Nothing if a dimension is negative or the product of the others than 0
// overflows, so that whoever multiplies the dimensions later, in any order, is safe.
std::optional<int64_t> byte_count(FileDType dtype, std::span<const int64_t> shape);

// "[2,3]"
std::string shape_text(std::span<const int64_t> shape);

// A dense row-major tensor in somebody else's memory, often a mapped file: the elements need not
// be aligned.
struct TensorRef {
  FileDType dtype = FileDType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  size_t bytes = 0;

  int64_t numel() const { return static_cast<int64_t>(bytes) / size_of(dtype); }
};

// A dense row-major tensor in memory of its own, aligned for every dtype.
struct Tensor {
  FileDType dtype = FileDType::kF32;
  std::vector<int64_t> shape = {0};
  std::vector<std::byte> data;

  Tensor() = default;
  Tensor(FileDType type, std::vector<int64_t> dims);  // zeros; an Error if the shape is impossible
  explicit Tensor(const TensorRef& source)
      : dtype(source.dtype), shape(source.shape), data(source.data, source.data + source.bytes) {}

  int64_t numel() const { return static_cast<int64_t>(data.size()) / size_of(dtype); }
  TensorRef ref() const { return {dtype, shape, data.data(), data.size()}; }
};

struct NamedTensor {
  std::string name;
  TensorRef tensor;
};

// Calls visitor(std::type_identity<T>{}) with the C++ type that stores the dtype. A bool is
// visited as the byte it is, because a bool object may hold nothing but 0 and 1.
template <class Visitor>
decltype(auto) visit_type(FileDType dtype, Visitor&& visitor) {
  switch (dtype) {
    case FileDType::kF64:
      return visitor(std::type_identity<double>{});
    case FileDType::kF32:
      return visitor(std::type_identity<float>{});
    case FileDType::kF16:
      return visitor(std::type_identity<f16>{});
    case FileDType::kBf16:
      return visitor(std::type_identity<bf16>{});
    case FileDType::kI64:
      return visitor(std::type_identity<int64_t>{});
    case FileDType::kI32:
      return visitor(std::type_identity<int32_t>{});
    case FileDType::kI16:
      return visitor(std::type_identity<int16_t>{});
    case FileDType::kI8:
      return visitor(std::type_identity<int8_t>{});
    case FileDType::kU8:
    case FileDType::kBool:
      break;
  }
  return visitor(std::type_identity<uint8_t>{});
}

template <class T>
T load(const TensorRef& tensor, int64_t i) {
  T value;
  std::memcpy(&value, tensor.data + static_cast<size_t>(i) * sizeof(T), sizeof(T));
  return value;
}

template <class T>
constexpr double to_f64(T value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<double>(value);
  } else {
    return double{to_f32(value)};
  }
}

// Element i in row-major order; integers beyond 2^53 are rounded.
double element(const TensorRef& tensor, int64_t i);

// Element i with as many digits as tell it from its neighbours.
std::string element_text(const TensorRef& tensor, int64_t i);

}  // namespace moeops::tools

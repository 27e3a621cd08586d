// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/tensor.h"

#include <fmt/format.h>

#include <algorithm>

#include "tools/tensor_file/error.h"

namespace moeops::tools {

static_assert(std::all_of(kFileDTypes.begin(), kFileDTypes.end(),
                          [](const FileDTypeInfo& entry) { return &info(entry.id) == &entry; }));

std::optional<int64_t> byte_count(FileDType dtype, std::span<const int64_t> shape) {
  int64_t bytes = size_of(dtype);
  bool empty = false;
  for (int64_t dim : shape) {
    if (dim < 0) return std::nullopt;
    if (dim == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(bytes, dim, &bytes)) {
      return std::nullopt;
    }
  }
  return empty ? 0 : bytes;
}

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ","));
}

Tensor::Tensor(FileDType type, std::vector<int64_t> dims) : dtype(type), shape(std::move(dims)) {
  const std::optional<int64_t> bytes = byte_count(dtype, shape);
  if (!bytes) {
    throw Error(
        fmt::format("a tensor of {} {} cannot be: expected sizes of at least 0 and less "
                    "than 2^63 bytes",
                    to_string(dtype), shape_text(shape)));
  }
  data.resize(static_cast<size_t>(*bytes));
}

double element(const TensorRef& tensor, int64_t i) {
  return visit_type(tensor.dtype,
                    [&]<class T>(std::type_identity<T>) { return to_f64(load<T>(tensor, i)); });
}

std::string element_text(const TensorRef& tensor, int64_t i) {
  return visit_type(tensor.dtype, [&]<class T>(std::type_identity<T>) {
    if constexpr (std::is_arithmetic_v<T>) {
      return fmt::format("{}", load<T>(tensor, i));
    } else {
      return fmt::format("{}", to_f32(load<T>(tensor, i)));
    }
  });
}

}  // namespace moeops::tools

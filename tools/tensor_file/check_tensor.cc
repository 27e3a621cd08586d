// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/check_tensor.h"

#include <fmt/format.h>

#include "tools/tensor_file/error.h"

namespace moeops::tools {

void check_bools(std::string_view what, const TensorRef& tensor) {
  if (tensor.dtype != FileDType::kBool) return;
  for (size_t i = 0; i < tensor.bytes; ++i) {
    if (tensor.data[i] > std::byte{1}) {
      throw Error(fmt::format("{}: BOOL element {} is {}, expected 0 or 1", what, i,
                              std::to_integer<int>(tensor.data[i])));
    }
  }
}

void check_bytes(std::string_view what, const TensorRef& tensor) {
  const std::optional<int64_t> expected = byte_count(tensor.dtype, tensor.shape);
  if (!expected || static_cast<size_t>(*expected) != tensor.bytes) {
    throw Error(fmt::format("{}: {} bytes do not make a tensor of {} {}", what, tensor.bytes,
                            to_string(tensor.dtype), shape_text(tensor.shape)));
  }
}

}  // namespace moeops::tools

// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the adapters of the routing operators share.

#include <cstdint>

#include "tools/opdiff/operators.h"

namespace moeops::tools {

// The size of an output; one that overflows is more than Call::out makes.
inline int64_t product(int64_t a, int64_t b) {
  int64_t size = 0;
  return __builtin_mul_overflow(a, b, &size) ? INT64_MAX : size;
}

// The dtype of an output that has its input's.
inline DType dtype_like(const ConstTensorView& input) {
  return input.present() ? input.dtype : DType::kF32;
}

// An f32 sum of a few products, rounded to `dtype`.
inline Close rounded(DType dtype) {
  return {dtype == DType::kBf16 ? 0.008 : dtype == DType::kF16 ? 0.001 : 1e-6, 1e-6};
}

}  // namespace moeops::tools

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ref/ref.h>

#include <cinttypes>

#include "ops/core/arg_check.h"

namespace moeops::ref {

// The weights of one s8 matrix: w [N, K], or [K, N] with transpose_w; w_scale [N], or [1].
inline void check_linear_weights(ArgCheck& check, const Weights& weights, Dim& N, Dim& K) {
  if (weights.transpose_w) {
    check.input("w", weights.w, {DType::kS8}, {K, N});
  } else {
    check.input("w", weights.w, {DType::kS8}, {N, K});
  }
  check.require(K.value <= 65536, "K = %" PRId64 " is more than 65536, beyond which s32 overflows",
                K.value);
  const bool one_for_all = weights.w_scale.rank == 1 && weights.w_scale.dim(0) == 1;
  check.optional_input("w_scale", weights.w_scale, {DType::kF32},
                       {one_for_all ? Extent(1) : Extent(N)});
}

}  // namespace moeops::ref

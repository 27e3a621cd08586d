// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/packed_weights.h>

#include <cinttypes>

#include "ops/core/arg_check.h"

namespace moeops {

// The weights of one s8 matrix.
inline void check_linear_weights(ArgCheck& check, const PackedWeights& weights) {
  check.require(weights.packed(), "weights hold nothing");
  check.require(weights.form().role == WeightRole::kPlain,
                "weights are packed as gate and up, expected plain ones");
  check.require(weights.dtype() == DType::kS8, "weights are %s, expected s8",
                to_string(weights.dtype()));
  check.require(weights.experts() == 1, "weights hold %" PRId64 " matrices, expected one",
                weights.experts());
  check.memory("weights", weights.data(), weights.bytes());
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/swiglu.h>

#include <cinttypes>

#include "ops/core/arg_check.h"

namespace moeops::swiglu_internal {

// What every operator with a SwiGLU in it checks.
inline void check_params(ArgCheck& check, const SwigluParams& params) {
  check.choice("activation", params.activation, GatedActivation::kGeluTanh);
  check.choice("gate", params.gate, Gate::kInterleaved);
  check.require(params.activation != GatedActivation::kSwigluOai || params.limit >= 0.0f,
                "limit = %g is not a number from 0 on", static_cast<double>(params.limit));
}

// Sets I from the width 2I.
inline void halve(ArgCheck& check, const Dim& width, Dim& I) {
  check.require(width.value % 2 == 0, "%s = %" PRId64 " (from %s) is odd, but holds gate and up",
                width.name, width.value, width.from);
  I.value = width.value / 2;
  I.from = width.from;
}

}  // namespace moeops::swiglu_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/swiglu.h>

#include <cinttypes>

#include "ops/core/arg_check.h"
#include "ref/numeric.h"

namespace moeops::ref {

// Checks what every operator with a SwiGLU in it checks, and sets I from the width 2I.
inline void check_swiglu(ArgCheck& check, const SwigluParams& params, const Dim& width, Dim& I) {
  check.require(width.value % 2 == 0, "%s = %" PRId64 " (from %s) is odd, but holds gate and up",
                width.name, width.value, width.from);
  I.value = width.value / 2;
  I.from = width.from;
  check.choice("activation", params.activation, GatedActivation::kGeluTanh);
  check.choice("gate", params.gate, Gate::kInterleaved);
  check.require(params.activation != GatedActivation::kSwigluOai || params.limit >= 0.0f,
                "limit = %g is not a number from 0 on", static_cast<double>(params.limit));
}

inline float gated(const SwigluParams& params, float g, float u) {
  switch (params.activation) {
    case GatedActivation::kSilu:
      return silu(g) * u;
    case GatedActivation::kSwigluOai:  // comparisons that let NaN through
      g = g > params.limit ? params.limit : g;
      u = u > params.limit ? params.limit : u < -params.limit ? -params.limit : u;
      return g * sigmoid(params.alpha * g) * (u + 1.0f);
    case GatedActivation::kGeluTanh:
      return gelu_tanh(g) * u;
  }
  return 0.0f;
}

// One row: gate_up [2I] to h [I].
inline void swiglu_row(const SwigluParams& params, int64_t I, const float* gate_up, float* h) {
  for (int64_t j = 0; j < I; ++j) {
    switch (params.gate) {
      case Gate::kLeft:
        h[j] = gated(params, gate_up[j], gate_up[I + j]);
        break;
      case Gate::kRight:
        h[j] = gated(params, gate_up[I + j], gate_up[j]);
        break;
      case Gate::kInterleaved:
        h[j] = gated(params, gate_up[2 * j], gate_up[2 * j + 1]);
        break;
    }
  }
}

}  // namespace moeops::ref

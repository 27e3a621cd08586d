// SPDX-License-Identifier: Apache-2.0
#pragma once

// act(g) * u over the vector layer: include one simd_<isa>.h first.

#include <moeops/ops/swiglu.h>

#include "ops/core/simd_math.h"

namespace moeops::swiglu_internal {
namespace {

inline simd::Vec gated(const SwigluParams& params, simd::Vec g, simd::Vec u) {
  using simd::Vec;
  switch (params.activation) {
    case GatedActivation::kSilu:
      return simd::silu(g) * u;
    case GatedActivation::kGeluTanh:
      return simd::gelu_tanh(g) * u;
    default: {
      // Comparisons that let NaN through.
      const Vec limit = simd::broadcast(params.limit);
      const Vec least = simd::broadcast(-params.limit);
      const Vec gate = simd::select(g > limit, limit, g);
      const Vec up = simd::select(u > limit, limit, simd::select(u < least, least, u));
      return gate * simd::sigmoid(simd::broadcast(params.alpha) * gate) *
             (up + simd::broadcast(1.0f));
    }
  }
}

}  // namespace
}  // namespace moeops::swiglu_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

// act(g) * u over the vector layer: include one simd_<isa>.h first.

#include <moeops/ops/swiglu.h>

#include "ops/core/simd_math.h"

namespace moeops::swiglu_internal {
namespace {

// The same with the activation known when it is compiled, for loops of their own.
template <GatedActivation A>
[[gnu::always_inline]] inline simd::Vec gated_as(const SwigluParams& params, simd::Vec g,
                                                 simd::Vec u) {
  using simd::Vec;
  if constexpr (A == GatedActivation::kSilu) return simd::silu(g) * u;
  if constexpr (A == GatedActivation::kGeluTanh) return simd::gelu_tanh(g) * u;
  if constexpr (A == GatedActivation::kSwigluOai) {
    // min and max give their second operand where one is NaN: it stays.
    const Vec limit = simd::broadcast(params.limit);
    const Vec gate = simd::min(limit, g);
    const Vec up = simd::max(simd::broadcast(-params.limit), simd::min(limit, u));
    return gate / simd::one_plus_exp_minus(simd::broadcast(params.alpha) * gate) *
           (up + simd::broadcast(1.0f));
  }
}

inline simd::Vec gated(const SwigluParams& params, simd::Vec g, simd::Vec u) {
  switch (params.activation) {
    case GatedActivation::kSilu:
      return gated_as<GatedActivation::kSilu>(params, g, u);
    case GatedActivation::kGeluTanh:
      return gated_as<GatedActivation::kGeluTanh>(params, g, u);
    default:
      return gated_as<GatedActivation::kSwigluOai>(params, g, u);
  }
}

}  // namespace
}  // namespace moeops::swiglu_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

// act(g) * u over the vector layer: include one simd_<isa>.h first.

#include <moeops/ops/swiglu.h>

#include "ops/core/simd_math.h"

namespace moeops::swiglu_internal {
namespace {

// The activation is known when this is compiled: a loop that chose it for every vector would keep
// no constant in a register.
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

}  // namespace
}  // namespace moeops::swiglu_internal

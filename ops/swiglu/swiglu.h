// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/params.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

namespace moeops {

// How gate and up make one value, for every operator that has a SwiGLU in it.
struct SwigluParams {
  GatedActivation activation = GatedActivation::kSilu;
  Gate gate = Gate::kLeft;
  float limit = 7.0f;    // kSwigluOai only; not negative
  float alpha = 1.702f;  // kSwigluOai only
};

// swiglu: the gated activation of an expert, act(gate) * up.
//
// SHAPES
//   x [M, 2I]  f32 | bf16 | f16               rows may be strided
//   y [M, I]   x's dtype                      rows may be strided
//
// DEFINITION
//   for i in 0 .. M, j in 0 .. I:             # in f32, rounded to y's dtype
//     gate left:         g, u = x[i][j],     x[i][I + j]
//     gate right:        g, u = x[i][I + j], x[i][j]
//     gate interleaved:  g, u = x[i][2 * j], x[i][2 * j + 1]
//     silu:        y[i][j] = g / (1 + exp(-g)) * u
//     gelu_tanh:   y[i][j] = 0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))) * u
//     swiglu_oai:  g = min(g, limit); u = clamp(u, -limit, limit)       # NaN stays NaN
//                  y[i][j] = g * sigmoid(alpha * g) * (u + 1)
//
// REGULARITIES  I is 768 to 14336, M the rows of a w13 GEMM; experts made for it interleave gate
//   and up (GPT-OSS), the others keep them apart.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, an odd
//   width of x, sizes or dtypes that disagree, a limit that is negative or NaN with swiglu_oai, y
//   overlapping x.
// EMPTY, NAN  M or I may be 0. A NaN or infinity in a row of x reaches that row of y only.
// ALIASING, ALIGNMENT  y does not overlap x. Views need their element's alignment.
// DETERMINISM  Each element of y depends on its own two of x alone, and is the same on every ISA.
//   silu and the sigmoid are within 2.5 ulp; gelu_tanh(g) within 3, or, for g < 0, 2^-22 of |g|.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN SwiGlu; swiglu_oai is GPT-OSS's clamped form.
struct SwigluArgs {
  ConstTensorView x;
  SwigluParams swiglu;
  TensorView y;
};

Status swiglu(Context& ctx, const SwigluArgs& args);

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/grouped_matmul.h>
#include <moeops/quant/quant_matmul.h>

#include "ops/core/arg_check.h"
#include "quant/w8a8/linear_weights.h"

namespace moeops {

namespace {

// A bias [N] as that of one group, [1, N].
ConstTensorView one_group(ConstTensorView view) {
  if (!view.present()) return {};
  view.rank = 2;
  view.shape = {1, view.dim(0)};
  return view;
}

}  // namespace

Status quant_matmul(Context& ctx, const PackedWeights& weights, const QuantMatmulArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  ArgCheck check("quant_matmul");
  check_linear_weights(check, weights);
  Dim M{"M"}, K{"K", weights.k(), "weights"}, N{"N", weights.n(), "weights"};
  check.input("x", args.x, {DType::kS8}, {M, K});
  check.optional_input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {N});
  check.optional_input("offset", args.offset, {DType::kF32}, {1});
  check.output("y", args.y, {DType::kF32, DType::kBf16, DType::kS8, DType::kI32}, {M, N});
  MOEOPS_RETURN_IF_ERROR(check.finish());

  // grouped_matmul checks which of these go together, before it writes.
  GroupedMatmulArgs gemm;
  gemm.x = args.x;
  gemm.group_list = {&M.value, {1}};
  gemm.bias = one_group(args.bias);
  gemm.x_scale = args.x_scale;
  gemm.offset = args.offset;
  gemm.y = args.y;
  return grouped_matmul(ctx, weights, gemm);
}

}  // namespace moeops

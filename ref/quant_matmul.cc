// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <vector>

#include "ops/core/arg_check.h"
#include "ref/guarded.h"
#include "ref/linear_weights.h"

namespace moeops::ref {

namespace {

// The view with a dimension of 1 in front.
ConstTensorView one_group(const ConstTensorView& view) {
  if (!view.present()) return {};
  ConstTensorView group = view;
  group.rank = view.rank + 1;
  group.shape = {1, view.dim(0), view.dim(1)};
  return group;
}

Status run(const Weights& weights, const QuantMatmulArgs& args) {
  ArgCheck check("quant_matmul");
  Dim M{"M"}, K{"K"}, N{"N"};
  check.input("x", args.x, {DType::kS8}, {M, K});
  check_linear_weights(check, weights, N, K);
  check.optional_input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {N});
  check.optional_input("offset", args.offset, {DType::kF32}, {1});
  check.output("y", args.y, {DType::kF32, DType::kBf16, DType::kS8, DType::kI32}, {M, N});
  MOEOPS_RETURN_IF_ERROR(check.finish());

  // grouped_matmul checks which of these go together, before it writes.
  Weights group{one_group(weights.w), weights.transpose_w, one_group(weights.w_scale)};
  std::vector<float> w_scale;
  if (weights.w_scale.present() && weights.w_scale.dim(0) != N.value) {
    w_scale.assign(static_cast<size_t>(N.value), weights.w_scale.row<float>(0)[0]);
    group.w_scale = {w_scale.data(), {1, N.value}};
  }
  GroupedMatmulArgs gemm;
  gemm.x = args.x;
  gemm.group_list = {&M.value, {1}};
  gemm.bias = one_group(args.bias);
  gemm.x_scale = args.x_scale;
  gemm.offset = args.offset;
  gemm.y = args.y;
  return grouped_matmul(group, gemm);
}

}  // namespace

Status quant_matmul(const Weights& weights, const QuantMatmulArgs& args) noexcept {
  return guarded("quant_matmul", [&] { return run(weights, args); });
}

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/grouped_matmul.h>
#include <moeops/ref/ref.h>

#include "tools/opdiff/operators/common.h"

namespace moeops::tools {

namespace {

Status run(Call& call) {
  ref::Weights weights;
  weights.w = call.in("w");
  weights.transpose_w = call.params().flag("transpose_w");
  weights.w_scale = call.in("w_scale");

  GroupedMatmulArgs args;
  args.x = call.in("x");
  args.group_list = call.in("group_list");
  args.list_type = list_type(call.params());
  args.bias = call.in("bias");
  args.x_scale = call.in("x_scale");
  args.offset = call.in("offset");
  args.activation = activation(call.params());
  args.uncovered = call.params().choice<Uncovered>(
      "uncovered", {{"zero", Uncovered::kZero}, {"keep", Uncovered::kKeep}});
  args.y = call.out("y", out_dtype(call.params(), args.x.dtype),
                    {call.dim("x", 0), call.dim("w", weights.transpose_w ? 2 : 1)});

  if (call.impl() == Impl::kRef) return ref::grouped_matmul(weights, args);
  PackedWeights packed;
  MOEOPS_RETURN_IF_ERROR(pack_plain(call, weights, &packed));
  return grouped_matmul(call.context(), packed, args);
}

void make(Maker& maker) {
  const int64_t M = maker.dim("M"), K = maker.dim("K"), N = maker.dim("N"), E = maker.dim("E");
  const bool transpose_w = maker.params().flag("transpose_w");
  const std::vector<int64_t> w_shape = transpose_w ? std::vector{E, K, N} : std::vector{E, N, K};
  if (maker.dtype() == DType::kS8) {
    maker.integers("x", DType::kS8, {M, K}, -127, 127);
    maker.integers("w", DType::kS8, w_shape, -127, 127);
    if (out_dtype(maker.params(), DType::kS8) != DType::kI32) {
      maker.uniform("w_scale", {E, N}, 0.001f, 0.01f);
      maker.uniform("x_scale", {M}, 0.001f, 0.01f);
    }
  } else {
    maker.normal("x", maker.dtype(), {M, K});
    maker.normal("w", maker.dtype(), w_shape);
    maker.normal("bias", DType::kF32, {E, N});
  }
  make_group_list(maker, E, M);
  const DType y = out_dtype(maker.params(), maker.dtype());
  if (y == DType::kBf16) {
    maker.tolerance("y", Close{0.008, gemm_atol(K)});
  } else if (y == DType::kF32) {
    maker.tolerance("y", Close{1e-5, maker.dtype() == DType::kS8 ? 0 : gemm_atol(K)});
  }
}

}  // namespace

Operator grouped_matmul_operator() { return {"grouped_matmul", run, make}; }

}  // namespace moeops::tools

// SPDX-License-Identifier: Apache-2.0
#include <moeops/quant/dynamic_quant.h>
#include <moeops/ref/ref.h>

#include "tools/opdiff/operators/common.h"

namespace moeops::tools {

namespace {

Status run(Call& call) {
  const int64_t M = call.dim("x", 0);
  DynamicQuantArgs args;
  args.x = call.in("x");
  args.smooth = call.in("smooth");
  args.group_list = call.in("group_list");
  args.asymmetric = call.params().flag("asymmetric");
  args.q = call.out("q", DType::kS8, {M, call.dim("x", 1)});
  args.scale = call.out("scale", DType::kF32, {M});
  if (args.asymmetric) args.offset = call.out("offset", DType::kF32, {M});
  if (call.impl() == Impl::kRef) return ref::dynamic_quant(args);
  return dynamic_quant(call.context(), args);
}

// G > 0: that many groups, each with its smooth factors.
void make(Maker& maker) {
  const int64_t M = maker.dim("M"), H = maker.dim("H"), G = maker.dim("G", 0);
  maker.params().flag("asymmetric");
  maker.normal("x", maker.dtype(), {M, H});
  if (G <= 0) {
    maker.uniform("smooth", {H}, 0.5f, 2.0f);
    return;
  }
  maker.uniform("smooth", {G, H}, 0.5f, 2.0f);
  std::vector<int64_t> rows = maker.counts(G, M);
  for (size_t g = 1; g < rows.size(); ++g) rows[g] += rows[g - 1];
  maker.values("group_list", DType::kI64, {G}, rows);
}

}  // namespace

Operator dynamic_quant_operator() { return {"dynamic_quant", run, make}; }

}  // namespace moeops::tools

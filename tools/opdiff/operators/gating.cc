// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/gating_top_k.h>
#include <moeops/ref/ref.h>

#include "tools/opdiff/operators.h"

namespace moeops::tools {

namespace {

GatingTopKArgs read_params(Params& params) {
  GatingTopKArgs args;
  args.k = params.integer("k", args.k);
  args.score = params.choice<GatingScore>(
      "score", {{"softmax", GatingScore::kSoftmax}, {"sigmoid", GatingScore::kSigmoid}});
  args.group_count = params.integer("group_count", args.group_count);
  args.k_group = params.integer("k_group", args.k_group);
  args.group_select = params.choice<GroupSelect>(
      "group_select", {{"max", GroupSelect::kMax}, {"top2_sum", GroupSelect::kTop2Sum}});
  args.renormalize = params.flag("renormalize");
  args.routed_scaling_factor = static_cast<float>(params.number("routed_scaling_factor", 1.0));
  args.eps = static_cast<float>(params.number("eps", 1e-20));
  return args;
}

Status run(Call& call) {
  const int64_t T = call.dim("logits", 0);
  GatingTopKArgs args = read_params(call.params());
  args.logits = call.in("logits");
  args.bias = call.in("bias");
  args.finished = call.in("finished");
  args.weights = call.out("weights", DType::kF32, {T, args.k});
  args.expert_ids = call.out("expert_ids", DType::kI32, {T, args.k});
  args.scores = call.optional_out("scores", DType::kF32, {T, call.dim("logits", 1)});
  args.row_index = call.optional_out("row_index", DType::kI32, {T, args.k});
  return call.impl() == Impl::kRef ? ref::gating_top_k(args) : gating_top_k(call.context(), args);
}

void make(Maker& maker) {
  const int64_t T = maker.dim("T"), E = maker.dim("E");
  maker.parameter("k", "K");
  const GatingTopKArgs args = read_params(maker.params());
  maker.normal("logits", maker.dtype(), {T, E}, 2.0f);
  if (args.score == GatingScore::kSigmoid) maker.normal("bias", DType::kF32, {E}, 0.1f);
  for (const char* name : {"weights", "scores"}) maker.tolerance(name, Close{2e-6, 1e-7});
}

}  // namespace

Operator gating_top_k_operator() { return {"gating_top_k", run, make}; }

}  // namespace moeops::tools

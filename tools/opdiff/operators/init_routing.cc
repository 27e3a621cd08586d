// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/init_routing.h>
#include <moeops/ref/ref.h>

#include <algorithm>

#include "tools/opdiff/operators/routing.h"

namespace moeops::tools {

namespace {

InitRoutingArgs read_params(Params& params) {
  InitRoutingArgs args;
  args.expert_count = params.integer("expert_count", args.expert_count);
  const auto [begin, end] = params.range("expert_range", {0, args.expert_count});
  args.expert_range = ExpertRange{begin, end};
  args.active_rows = params.integer("active_rows", args.active_rows);
  args.mode = params.choice<RoutingMode>(
      "mode", {{"dropless", RoutingMode::kDropless}, {"drop_pad", RoutingMode::kDropPad}});
  args.capacity = params.integer("capacity", args.capacity);
  args.counts = params.choice<ExpertCounts>("counts", {{"none", ExpertCounts::kNone},
                                                       {"cumsum", ExpertCounts::kCumsum},
                                                       {"count", ExpertCounts::kCount},
                                                       {"key_value", ExpertCounts::kKeyValue}});
  args.row_index_type = params.choice<RowIndexType>(
      "row_index_type", {{"gather", RowIndexType::kGather}, {"scatter", RowIndexType::kScatter}});
  args.quant = params.choice<RoutingQuant>("quant", {{"none", RoutingQuant::kNone},
                                                     {"static", RoutingQuant::kStatic},
                                                     {"dynamic", RoutingQuant::kDynamic}});
  args.allow_masked = params.flag("allow_masked");
  return args;
}

// The experts of the range, also of one that is not legal.
int64_t experts_of(const InitRoutingArgs& args) {
  const int64_t E = std::max<int64_t>(args.expert_count, 0);
  return std::clamp<int64_t>(args.expert_range->end, 0, E) -
         std::clamp<int64_t>(args.expert_range->begin, 0, E);
}

Status run_init_routing(Call& call) {
  const int64_t H = call.dim("x", 1);
  const int64_t N = product(call.dim("expert_ids", 0), call.dim("expert_ids", 1));
  InitRoutingArgs args = read_params(call.params());
  args.x = call.in("x");
  args.expert_ids = call.in("expert_ids");
  args.scale = call.in("scale");
  args.offset = call.in("offset");

  const bool drop_pad = args.mode == RoutingMode::kDropPad;
  const DType dtype = args.quant == RoutingQuant::kNone ? dtype_like(args.x) : DType::kS8;
  args.expanded_x = drop_pad ? call.out("expanded_x", dtype, {args.expert_count, args.capacity, H})
                             : call.out("expanded_x", dtype, {N, H});
  if (args.quant == RoutingQuant::kDynamic ||
      (args.quant == RoutingQuant::kNone && args.scale.present())) {
    args.expanded_scale = call.out("expanded_scale", DType::kF32,
                                   {drop_pad ? product(args.expert_count, args.capacity) : N});
  }
  args.row_index = call.out("row_index", DType::kI32, {N});
  if (args.counts == ExpertCounts::kKeyValue) {
    args.expert_tokens = call.out("expert_tokens", DType::kI64, {experts_of(args), 2});
  } else if (args.counts != ExpertCounts::kNone) {
    args.expert_tokens = call.out("expert_tokens", DType::kI64, {experts_of(args)});
  }
  args.valid_rows = call.out("valid_rows", DType::kI64, {1});
  args.dropped_rows = call.optional_out("dropped_rows", DType::kI64, {1});

  const Status status =
      call.impl() == Impl::kRef ? ref::init_routing(args) : init_routing(call.context(), args);
  if (status.ok() && !drop_pad) {
    const int64_t rows = args.valid_rows.row<int64_t>(0)[0];
    call.set_defined_rows("expanded_x", rows);
    call.set_defined_rows("expanded_scale", rows);
  }
  return status;
}

void make_init_routing(Maker& maker) {
  const int64_t T = maker.dim("T"), H = maker.dim("H"), K = maker.dim("K");
  maker.parameter("expert_count", "E");
  const InitRoutingArgs args = read_params(maker.params());
  maker.normal("x", maker.dtype(), {T, H});
  if (args.allow_masked) {
    maker.integers("expert_ids", DType::kI32, {T, K}, -1, args.expert_count);
  } else {
    maker.expert_ids("expert_ids", T, K, args.expert_count);
  }
  switch (args.quant) {
    case RoutingQuant::kNone:
      maker.uniform("scale", {T}, 0.001f, 0.01f);
      break;
    case RoutingQuant::kStatic:
      maker.uniform("scale", {1}, 20.0f, 40.0f);
      maker.uniform("offset", {1}, -10.0f, 10.0f);
      break;
    case RoutingQuant::kDynamic:
      maker.uniform("scale", {experts_of(args), H}, 0.5f, 2.0f);
      break;
  }
}

struct Cutoff {
  int64_t T, K;
  double topk_scaling_factor;
  int64_t floor_tokens;
};

Cutoff read_cutoff(Params& params) {
  return {params.integer("T", 0), params.integer("K", 0), params.number("topk_scaling_factor", 0.0),
          params.integer("floor_tokens", 65536)};
}

Status run_cutoff_rows(Call& call) {
  const Cutoff cutoff = read_cutoff(call.params());
  const auto cutoff_rows = call.impl() == Impl::kRef ? ref::cutoff_rows : moeops::cutoff_rows;
  return cutoff_rows(cutoff.T, cutoff.K, cutoff.topk_scaling_factor, cutoff.floor_tokens,
                     call.out("rows", DType::kI64, {1}).row<int64_t>(0));
}

void make_cutoff_rows(Maker& maker) { read_cutoff(maker.params()); }

}  // namespace

Operator init_routing_operator() { return {"init_routing", run_init_routing, make_init_routing}; }

Operator cutoff_rows_operator() { return {"cutoff_rows", run_cutoff_rows, make_cutoff_rows}; }

}  // namespace moeops::tools

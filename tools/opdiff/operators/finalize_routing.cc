// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/finalize_routing.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <numeric>

#include "tools/opdiff/operators/routing.h"

namespace moeops::tools {

namespace {

IndexLayout index_layout(Params& params) {
  return params.choice<IndexLayout>("index_layout",
                                    {{"row", IndexLayout::kRow}, {"column", IndexLayout::kColumn}});
}

ExpandedRows expanded_rows(Params& params) {
  return params.choice<ExpandedRows>(
      "rows", {{"flat", ExpandedRows::kFlat}, {"drop_pad", ExpandedRows::kDropPad}});
}

Status run(Call& call) {
  FinalizeRoutingArgs args;
  args.expanded = call.in("expanded");
  args.row_index = call.in("row_index");
  args.scales = call.in("scales");
  args.bias = call.in("bias");
  args.expert_ids = call.in("expert_ids");
  args.skip1 = call.in("skip1");
  args.skip2 = call.in("skip2");
  args.index_layout = index_layout(call.params());
  args.rows = expanded_rows(call.params());
  args.out = call.out("out", dtype_like(args.expanded),
                      {call.dim(args.scales.present() ? "scales" : "row_index", 0),
                       call.dim("expanded", args.rows == ExpandedRows::kDropPad ? 2 : 1)});
  return call.impl() == Impl::kRef ? ref::finalize_routing(args)
                                   : finalize_routing(call.context(), args);
}

// One slot in eight has no row.
void make(Maker& maker) {
  const int64_t T = maker.dim("T"), H = maker.dim("H"), K = maker.dim("K"), E = maker.dim("E");
  const DType dtype = maker.dtype();
  index_layout(maker.params());
  const int64_t N = product(T, K);
  int64_t M = N;
  if (expanded_rows(maker.params()) == ExpandedRows::kDropPad) {
    const int64_t C = maker.dim("C");
    M = product(E, C);
    maker.normal("expanded", dtype, {E, C, H});
  } else {
    maker.normal("expanded", dtype, {M, H});
  }
  std::vector<int64_t> rows(static_cast<size_t>(std::max<int64_t>(M, 0)));
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), maker.random());
  rows.resize(static_cast<size_t>(std::max<int64_t>(N, 0)), -1);
  for (size_t slot = 0; slot < rows.size(); slot += 8) rows[slot] = -1;
  maker.values("row_index", DType::kI32, {N}, rows);
  maker.uniform("scales", {T, K}, 0.0f, 1.0f);
  maker.normal("bias", dtype, {E, H});
  maker.expert_ids("expert_ids", T, K, E);
  maker.normal("skip1", dtype, {T, H});
  maker.normal("skip2", dtype, {T, H});
  maker.tolerance("out", rounded(dtype));
}

}  // namespace

Operator finalize_routing_operator() { return {"finalize_routing", run, make}; }

}  // namespace moeops::tools

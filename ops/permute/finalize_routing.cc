// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/finalize_routing.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>

#include "ops/core/arg_check.h"
#include "ops/core/carver.h"
#include "ops/core/team.h"
#include "ops/permute/row_kernels.h"
#include "ops/permute/rows.h"

namespace moeops {

using namespace routing_internal;  // NOLINT(google-build-using-namespace)

namespace {

// Where the slots of a call have their rows.
class Slots {
 public:
  Slots(const FinalizeRoutingArgs& args, int64_t T, int64_t K)
      : rows_(args.row_index.row<int32_t>(0)),
        token_stride_(args.index_layout == IndexLayout::kRow ? K : 1),
        choice_stride_(args.index_layout == IndexLayout::kRow ? 1 : T) {}

  int64_t index(int64_t t, int64_t k) const { return t * token_stride_ + k * choice_stride_; }
  int64_t row(int64_t t, int64_t k) const { return rows_[index(t, k)]; }

 private:
  const int32_t* rows_;
  int64_t token_stride_;
  int64_t choice_stride_;
};

Status check_call(const FinalizeRoutingArgs& args) {
  ArgCheck check("finalize_routing");
  check.choice("index_layout", args.index_layout, IndexLayout::kColumn);
  check.choice("rows", args.rows, ExpandedRows::kDropPad);
  const DType dtype = args.expanded.dtype;
  Dim M{"M"}, E{"E"}, C{"C"}, H{"H"}, T{"T"}, K{"K"};
  if (args.rows == ExpandedRows::kDropPad) {
    check.input("expanded", args.expanded, {DType::kF32, DType::kBf16, DType::kF16}, {E, C, H});
  } else {
    check.input("expanded", args.expanded, {DType::kF32, DType::kBf16, DType::kF16}, {M, H});
  }
  if (args.scales.present()) {
    check.input("scales", args.scales, {DType::kF32}, {T, K});
  } else {
    K = {"K", 1, "the absent scales"};
  }
  check.optional_input("bias", args.bias, {dtype}, {E, H});
  check.optional_input("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  check.require(!args.bias.present() || args.expert_ids.present(),
                "bias is given, but expert_ids is not");
  check.optional_input("skip1", args.skip1, {dtype}, {T, H});
  check.optional_input("skip2", args.skip2, {dtype}, {T, H});
  check.require(!args.skip2.present() || args.skip1.present(), "skip2 is given, but skip1 is not");
  check.output("out", args.out, {dtype}, {T, H});
  Dim N{"T * K", check.ok() ? T.value * K.value : 0, T.from};
  check.input("row_index", args.row_index, {DType::kI32}, {N});
  return check.finish();
}

// The call, once its views are known to be right.
struct Call {
  const FinalizeRoutingArgs& args;
  const int64_t T;
  const int64_t K;
  const int64_t M;
  const Slots slots;

  bool is_legal(int64_t t, int64_t k) const {
    const int64_t row = slots.row(t, k);
    if (row < -1 || row >= M) return false;
    if (!args.bias.present() || row == -1) return true;
    const int64_t id = args.expert_ids.row<int32_t>(t)[k];
    return id >= 0 && id < args.bias.dim(0);
  }

  // The first slot t * K + k of tokens [begin, end) that is not legal; INT64_MAX if all are.
  int64_t bad_slot(int64_t begin, int64_t end) const {
    for (int64_t t = begin; K > 0 && t < end; ++t) {
      for (int64_t k = 0; k < K; ++k) {
        if (!is_legal(t, k)) return t * K + k;
      }
    }
    return INT64_MAX;
  }

  Status error(int64_t slot) const {
    const int64_t t = slot / K;
    const int64_t k = slot % K;
    ArgCheck check("finalize_routing");
    const int64_t row = slots.row(t, k);
    check.require(row >= -1 && row < M,
                  "row_index[%" PRId64 "] = %" PRId64 " is not in [-1, %" PRId64 ")",
                  slots.index(t, k), row, M);
    if (check.ok()) {
      check.require(false, "expert_ids[%" PRId64 ",%" PRId64 "] = %d is not in [0, %" PRId64 ")", t,
                    k, args.expert_ids.row<int32_t>(t)[k], args.bias.dim(0));
    }
    return check.finish();
  }

  RowTerms terms_of(int64_t t, RowTerm* room) const {
    int64_t count = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t row = slots.row(t, k);
      if (row == -1) continue;
      const void* bias =
          args.bias.present() ? row_at(args.bias, args.expert_ids.row<int32_t>(t)[k]) : nullptr;
      const float scale = args.scales.present() ? args.scales.row<float>(t)[k] : 1.0f;
      room[count++] = {row_at(args.expanded, row), bias, scale};
    }
    return {room, count};
  }
};

}  // namespace

Status finalize_routing(Context& ctx, const FinalizeRoutingArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_call(args));
  const int64_t T = args.out.dim(0);
  if (T == 0) return {};
  const int64_t K = args.scales.present() ? args.scales.dim(1) : 1;
  const int64_t M = args.expanded.rows();
  const Call call{args, T, K, M, Slots(args, T, K)};
  const int64_t row_bytes = bytes_of_row(args.out);
  const int workers = team_for(ctx, T, std::min(M + T, T * (K + 1)) * row_bytes + T * K * 8);
  const RowKernels& kernels = row_kernels(ctx.isa());

  RowLists<RowTerm> terms(workers, K, 2);
  Carver sizes;
  terms.lay_out(sizes);
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(sizes.bytes(), &scratch));
  Carver arrays(scratch);
  terms.lay_out(arrays);

  Deal tokens(args.out.dim(1) == 0 ? 0 : T, tokens_at_once(T, (K + 1) * row_bytes, workers));
  std::atomic<int64_t> bad_slot{INT64_MAX};
  run_team(workers, [&](const Team& team) {
    const int64_t bad =
        call.bad_slot(T * team.worker / team.size, T * (team.worker + 1) / team.size);
    for (int64_t seen = bad_slot; bad < seen && !bad_slot.compare_exchange_weak(seen, bad);) {
    }
    team.barrier();
    if (bad_slot != INT64_MAX) return;

    RowSum sum = {};
    sum.columns = args.out.columns();
    sum.stream = streams(T * row_bytes);
    for (int64_t begin, end; tokens.next(&begin, &end);) {
      sum_tokens(
          begin, end, terms.of(team.worker), K,
          [&](int64_t t, RowTerm* room) { return call.terms_of(t, room); },
          [&](int64_t t) {
            if (args.skip1.present()) sum.skip1 = row_at(args.skip1, t);
            if (args.skip2.present()) sum.skip2 = row_at(args.skip2, t);
            sum.out = row_at(args.out, t);
          },
          kernels.sum[float_index(args.out.dtype)], sum);
    }
    if (sum.stream) kernels.fence();
  });
  return bad_slot == INT64_MAX ? Status() : call.error(bad_slot);
}

}  // namespace moeops

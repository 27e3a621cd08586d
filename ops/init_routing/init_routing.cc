// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/init_routing.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "ops/core/arg_check.h"
#include "ops/core/carver.h"
#include "ops/core/team.h"
#include "ops/init_routing/slot_sort.h"
#include "ops/permute/row_kernels.h"
#include "ops/permute/rows.h"
#include "quant/dynamic_quant/kernels.h"

namespace moeops {

using namespace routing_internal;  // NOLINT(google-build-using-namespace)

namespace {

bool is_drop_pad(const InitRoutingArgs& args) { return args.mode == RoutingMode::kDropPad; }

void check_params(ArgCheck& check, const InitRoutingArgs& args, const ExpertRange& range,
                  int64_t T) {
  if (!check.ok()) return;
  const int64_t E = args.expert_count;
  check.require(E >= 0, "expert_count = %" PRId64 " is negative", E);
  check.require(range.begin >= 0 && range.begin <= range.end && range.end <= E,
                "expert_range = [%" PRId64 ", %" PRId64 ") does not lie in [0, %" PRId64 ")",
                range.begin, range.end, E);
  if (!is_drop_pad(args)) {
    check.require(args.active_rows >= 0, "active_rows = %" PRId64 " is negative", args.active_rows);
    return;
  }
  const int64_t most = std::max<int64_t>(T, 1);
  check.require(args.capacity >= 1 && args.capacity <= most,
                "capacity = %" PRId64 " is not in [1, %" PRId64 "]", args.capacity, most);
  check.require(range.begin == 0 && range.end == E,
                "expert_range = [%" PRId64 ", %" PRId64 "), but drop_pad needs [0, %" PRId64 ")",
                range.begin, range.end, E);
  check.require(args.row_index_type == RowIndexType::kGather,
                "row_index_type is scatter, but mode is drop_pad");
  if (!check.ok()) return;
  check.require(E == 0 || args.capacity <= INT32_MAX / E,
                "expert_count * capacity = %" PRId64 " * %" PRId64 " does not fit in i32", E,
                args.capacity);
}

// The views that depend on `quant`, and the rows of expanded_x.
void check_rows(ArgCheck& check, const InitRoutingArgs& args, int64_t experts, Dim& T, Dim& H) {
  if (!check.ok()) return;
  bool has_scale = false;
  switch (args.quant) {
    case RoutingQuant::kNone:
      check.optional_input("scale", args.scale, {DType::kF32}, {T});
      has_scale = args.scale.present();
      break;
    case RoutingQuant::kStatic:
      check.input("scale", args.scale, {DType::kF32}, {1});
      check.input("offset", args.offset, {DType::kF32}, {1});
      break;
    case RoutingQuant::kDynamic: {
      const bool one_for_all = args.scale.rank > 0 && args.scale.dim(0) == 1;
      check.optional_input("scale", args.scale, {DType::kF32}, {one_for_all ? 1 : experts, H});
      has_scale = true;
      break;
    }
  }
  if (args.quant != RoutingQuant::kStatic) {
    check.absent("offset", args.offset, "quant is not static");
  }

  const DType dtype = args.quant == RoutingQuant::kNone ? args.x.dtype : DType::kS8;
  Dim rows{"the rows of expanded_x"};
  if (is_drop_pad(args)) {
    rows = {"E * C", args.expert_count * args.capacity, "capacity"};
    check.output("expanded_x", args.expanded_x, {dtype}, {args.expert_count, args.capacity, H});
  } else {
    check.output("expanded_x", args.expanded_x, {dtype}, {rows, H});
  }
  if (has_scale) {
    check.output("expanded_scale", args.expanded_scale, {DType::kF32}, {rows});
  } else {
    check.absent("expanded_scale", args.expanded_scale,
                 args.quant == RoutingQuant::kNone ? "scale is not" : "quant is static");
  }
}

// All but the expert ids, and what the number of kept slots has to fit in.
Status check_call(const InitRoutingArgs& args, const ExpertRange& range) {
  ArgCheck check("init_routing");
  check.choice("mode", args.mode, RoutingMode::kDropPad);
  check.choice("counts", args.counts, ExpertCounts::kKeyValue);
  check.choice("row_index_type", args.row_index_type, RowIndexType::kScatter);
  check.choice("quant", args.quant, RoutingQuant::kDynamic);
  Dim T{"T"}, H{"H"}, K{"K"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {T, H});
  check.input("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  check_params(check, args, range, T.value);
  const int64_t experts = check.ok() ? range.end - range.begin : 0;
  const int64_t N = check.ok() ? T.value * K.value : 0;
  check_rows(check, args, experts, T, H);
  check.output("row_index", args.row_index, {DType::kI32}, {N});
  if (args.counts == ExpertCounts::kNone) {
    check.absent("expert_tokens", args.expert_tokens, "counts is none");
  } else if (args.counts == ExpertCounts::kKeyValue) {
    check.output("expert_tokens", args.expert_tokens, {DType::kI64}, {experts, 2});
  } else {
    check.output("expert_tokens", args.expert_tokens, {DType::kI64}, {experts});
  }
  check.optional_output("valid_rows", args.valid_rows, {DType::kI64}, {1});
  check.optional_output("dropped_rows", args.dropped_rows, {DType::kI64}, {1});
  check.require(N <= INT32_MAX, "T * K = %" PRId64 " does not fit in i32", N);
  return check.finish();
}

// The call, once its views are known to be right.
class Routing {
 public:
  Routing(const Context& ctx, const InitRoutingArgs& args, const ExpertRange& range)
      : args_(args),
        range_(range),
        drop_pad_(is_drop_pad(args)),
        N_(args.expert_ids.dim(0) * args.expert_ids.dim(1)),
        // Sizes beside a size of 0 may be anything.
        K_(N_ == 0 ? 0 : args.expert_ids.dim(1)),
        H_(args.x.rows() == 0 ? 0 : args.x.dim(1)),
        row_bytes_(args.expanded_x.rows() == 0 ? 0 : bytes_of_row(args.expanded_x)),
        most_rows_(drop_pad_ ? args.expanded_x.rows() : std::min(N_, args.expanded_x.rows())),
        workers_(team_for(ctx, args.x.dim(0), most_rows_ * row_bytes_ + N_ * 8)),
        sort_({args.expert_ids, args.expert_count, range.begin, range.end, args.allow_masked},
              workers_),
        kernels_(row_kernels(ctx.isa())),
        quantise_(dynamic_quant_internal::row_kernels(ctx.isa())),
        places_(workers_, K_),
        quantised_(workers_, args.quant == RoutingQuant::kNone ? 0 : H_),
        tokens_(N_ == 0 ? 0 : args.x.dim(0),
                tokens_at_once(args.x.dim(0), K_ * row_bytes_, workers_)) {}

  Status run(Context& ctx) {
    Carver sizes;
    lay_out(sizes);
    void* scratch = nullptr;
    MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(sizes.bytes(), &scratch));
    Carver arrays(scratch);
    lay_out(arrays);
    run_team(workers_, [this](const Team& team) { work(team); });
    return check_ids();
  }

 private:
  void lay_out(Carver& scratch) {
    places_.lay_out(scratch);
    quantised_.lay_out(scratch);
    row_of_slot_ = args_.row_index_type == RowIndexType::kGather ? args_.row_index.row<int32_t>(0)
                                                                 : scratch.take<int32_t>(N_);
    char* for_sort = scratch.take<char>(sort_.scratch_bytes());
    if (for_sort != nullptr) sort_.set_scratch(for_sort);
  }

  // Rows that belong to a slot; with drop_pad they are not the first ones.
  int64_t rows() const {
    if (!drop_pad_) {
      return args_.active_rows == 0 ? sort_.slots() : std::min(args_.active_rows, sort_.slots());
    }
    int64_t rows = 0;
    for (int64_t g = 0; g < sort_.groups(); ++g) rows += std::min(sort_.count(g), args_.capacity);
    return rows;
  }

  bool rows_fit() const { return drop_pad_ || rows() <= args_.expanded_x.dim(0); }

  // What could not be known before the slots were counted.
  Status check_ids() const {
    ArgCheck check("init_routing");
    if (const int64_t slot = sort_.bad_slot(); slot >= 0) {
      check.require(false, "expert_ids[%" PRId64 ",%" PRId64 "] = %d is not in [0, %" PRId64 ")%s",
                    slot / K_, slot % K_, args_.expert_ids.row<int32_t>(slot / K_)[slot % K_],
                    args_.expert_count, args_.allow_masked ? " and does not mask" : "");
    } else if (!rows_fit()) {
      check.require(false, "expanded_x.shape[0] = %" PRId64 ", expected at least R = %" PRId64,
                    args_.expanded_x.dim(0), rows());
    }
    return check.finish();
  }

  void work(const Team& team) {
    sort_.count(team);
    if (sort_.bad_slot() >= 0 || !rows_fit()) return;
    const int64_t valid = rows();
    const bool scatter = args_.row_index_type == RowIndexType::kScatter;
    SlotPlaces places;
    places.capacity = drop_pad_ ? args_.capacity : 0;
    places.rows = valid;
    places.row_of_slot = row_of_slot_;
    places.slot_of_row = scatter ? args_.row_index.row<int32_t>(0) : nullptr;
    sort_.place(team, places);
    if (team.worker == 0) {
      if (scatter) std::fill(places.slot_of_row + valid, places.slot_of_row + N_, -1);
      write_counts();
      if (args_.valid_rows.present()) args_.valid_rows.row<int64_t>(0)[0] = valid;
      if (args_.dropped_rows.present()) {
        args_.dropped_rows.row<int64_t>(0)[0] = (drop_pad_ ? N_ : sort_.slots()) - valid;
      }
    }
    if (drop_pad_) {
      for (int64_t g = team.worker - 1; g < sort_.groups(); g += team.size) clear_after(g);
    }
    team.barrier();

    const bool stream = streams(most_rows_ * row_bytes_);
    const Worker worker{places_.of(team.worker), quantised_.of(team.worker), stream};
    for (int64_t begin, end; tokens_.next(&begin, &end);) {
      for (int64_t t = begin; t < end; ++t) write_token(t, worker);
    }
    if (stream) kernels_.fence();
  }

  void write_counts() const {
    const TensorView& out = args_.expert_tokens;
    if (args_.counts == ExpertCounts::kNone) return;
    if (args_.counts == ExpertCounts::kKeyValue) {
      int64_t pairs = 0;
      for (int64_t g = 0; g < sort_.groups(); ++g) {
        if (sort_.count(g) == 0) continue;
        out.row<int64_t>(pairs)[0] = sort_.expert(g);
        out.row<int64_t>(pairs++)[1] = sort_.count(g);
      }
      for (; pairs < out.dim(0); ++pairs) std::fill_n(out.row<int64_t>(pairs), 2, 0);
      return;
    }
    auto* counts = out.row<int64_t>(0);
    int64_t e = 0;  // the first expert that has no count yet, less begin
    int64_t sum = 0;
    const bool cumsum = args_.counts == ExpertCounts::kCumsum;
    for (int64_t g = 0; g < sort_.groups(); ++g) {
      for (; e < sort_.expert(g) - range_.begin; ++e) counts[e] = cumsum ? sum : 0;
      sum += sort_.count(g);
      counts[e++] = cumsum ? sum : sort_.count(g);
    }
    for (; e < out.dim(0); ++e) counts[e] = cumsum ? sum : 0;
  }

  // drop_pad: zeroes the rows between the last one in use of a group, or the beginning, and the
  // next group's first.
  void clear_after(int64_t group) const {
    const int64_t C = args_.capacity;
    const int64_t begin = group < 0 ? 0 : sort_.expert(group) * C + std::min(sort_.count(group), C);
    const int64_t end =
        group + 1 < sort_.groups() ? sort_.expert(group + 1) * C : args_.expert_count * C;
    for (int64_t row = begin; row < end; ++row) {
      std::memset(row_at(args_.expanded_x, row), 0, static_cast<size_t>(row_bytes_));
    }
    if (args_.expanded_scale.present()) {
      auto* scales = args_.expanded_scale.row<float>(0);
      std::fill(scales + begin, scales + end, 0.0f);
    }
  }

  struct Worker {
    void** places;  // [K]
    int8_t* q;      // [H]
    bool stream;
  };

  void write_token(int64_t t, const Worker& worker) const {
    const int32_t* rows = row_of_slot_ + t * K_;
    const char* x = row_at(args_.x, t);
    RowCopy copy{x, row_bytes_, worker.places, 0, worker.stream};
    for (int64_t k = 0; k < K_; ++k) {
      if (rows[k] >= 0) worker.places[copy.count++] = row_at(args_.expanded_x, rows[k]);
    }
    if (copy.count == 0) return;
    if (args_.quant != RoutingQuant::kNone) {
      copy.from = worker.q;
      if (t + 1 < args_.x.dim(0)) {
        copy.next = row_at(args_.x, t + 1);
        copy.next_bytes = bytes_of_row(args_.x);
      }
    }

    float scale = 0.0f;
    switch (args_.quant) {
      case RoutingQuant::kNone:
        kernels_.copy(copy);
        if (!args_.scale.present()) return;
        scale = args_.scale.row<float>(0)[t];
        break;
      case RoutingQuant::kStatic:
        kernels_.quantise[float_index(args_.x.dtype)](x, H_, args_.scale.row<float>(0)[0],
                                                      args_.offset.row<float>(0)[0], worker.q);
        kernels_.copy(copy);
        return;
      case RoutingQuant::kDynamic: {
        const auto quantise = quantise_.s8.of(args_.x.dtype);
        if (!args_.scale.present() || args_.scale.dim(0) == 1) {
          quantise(x, args_.scale.present() ? args_.scale.row<float>(0) : nullptr, H_, worker.q,
                   &scale);
          kernels_.copy(copy);
          break;
        }
        // Each expert smooths the token in its own way.
        copy.count = 1;
        for (int64_t k = 0; k < K_; ++k) {
          if (rows[k] < 0) continue;
          const int64_t expert = args_.expert_ids.row<int32_t>(t)[k] - range_.begin;
          quantise(x, args_.scale.row<float>(expert), H_, worker.q,
                   args_.expanded_scale.row<float>(0) + rows[k]);
          kernels_.copy(copy);
          ++copy.to;
          copy.next_bytes = 0;
        }
        return;
      }
    }
    for (int64_t k = 0; k < K_; ++k) {
      if (rows[k] >= 0) args_.expanded_scale.row<float>(0)[rows[k]] = scale;
    }
  }

  const InitRoutingArgs& args_;
  const ExpertRange range_;
  const bool drop_pad_;
  const int64_t N_;
  const int64_t K_;
  const int64_t H_;
  const int64_t row_bytes_;  // of expanded_x
  const int64_t most_rows_;
  const int workers_;
  SlotSort sort_;
  const RowKernels& kernels_;
  const dynamic_quant_internal::RowKernels& quantise_;
  RowLists<void*> places_;      // of a token's rows in expanded_x
  RowLists<int8_t> quantised_;  // a token's row
  Deal tokens_;

  int32_t* row_of_slot_ = nullptr;
};

}  // namespace

Status init_routing(Context& ctx, const InitRoutingArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  const ExpertRange range = args.expert_range.value_or(ExpertRange{0, args.expert_count});
  MOEOPS_RETURN_IF_ERROR(check_call(args, range));
  return Routing(ctx, args, range).run(ctx);
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/token_permute.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "ops/core/arg_check.h"
#include "ops/core/carver.h"
#include "ops/core/team.h"
#include "ops/init_routing/slot_sort.h"
#include "ops/permute/row_kernels.h"
#include "ops/permute/rows.h"

namespace moeops {

using namespace routing_internal;  // NOLINT(google-build-using-namespace)

namespace {

// With drop_and_pad also the number of rows that each expert gets.
Status check_permute(const PermuteWithMapArgs& args, int64_t* capacity) {
  ArgCheck check("permute_with_map");
  Dim T{"T"}, H{"H"}, E{"E"};
  check.input("tokens", args.tokens, {DType::kF32, DType::kBf16, DType::kF16}, {T, H});
  check.input("map", args.map, {DType::kBool}, {T, E});
  check.optional_input("probs", args.probs, {DType::kF32}, {T, E});
  check.require(T.value <= INT32_MAX, "T = %" PRId64 " does not fit in i32", T.value);
  Dim M{"M"};
  *capacity = 0;
  if (args.drop_and_pad && check.ok()) {
    const int64_t total = args.num_out_tokens;
    if (T.value == 0 || E.value == 0) {
      check.require(total == 0,
                    "num_out_tokens = %" PRId64 ", expected 0 for T = %" PRId64 ", E = %" PRId64,
                    total, T.value, E.value);
    } else {
      check.require(total % E.value == 0,
                    "num_out_tokens = %" PRId64 " is not a multiple of E = %" PRId64, total,
                    E.value);
      *capacity = total / E.value;
      check.require(*capacity >= 1 && *capacity <= T.value,
                    "num_out_tokens / E = %" PRId64 " / %" PRId64 " is not in [1, T = %" PRId64 "]",
                    total, E.value, T.value);
    }
    M = {"M", total, "num_out_tokens"};
  }
  check.output("permuted", args.permuted, {args.tokens.dtype}, {M, H});
  check.output("sorted_indices", args.sorted_indices, {DType::kI32}, {M});
  if (args.probs.present()) {
    check.output("permuted_probs", args.permuted_probs, {DType::kF32}, {M});
  } else {
    check.absent("permuted_probs", args.permuted_probs, "probs is not");
  }
  return check.finish();
}

// visit(e) for the experts that a token's row of the map sets.
template <class Visit>
void for_each_set(const uint8_t* map, int64_t E, Visit visit) {
  int64_t e = 0;
  for (; e + 8 <= E; e += 8) {
    uint64_t eight;
    std::memcpy(&eight, map + e, sizeof(eight));
    if (eight == 0) continue;
    for (int64_t i = e; i < e + 8; ++i) {
      if (map[i] != 0) visit(i);
    }
  }
  for (; e < E; ++e) {
    if (map[e] != 0) visit(e);
  }
}

// The call, once its views are known to be right. A part of the tokens after another, each worker
// counts whom the map chose, then writes their rows from there.
class MapPermutation {
 public:
  MapPermutation(const Context& ctx, const PermuteWithMapArgs& args, int64_t capacity)
      : args_(args),
        T_(args.map.dim(0)),
        E_(args.map.dim(1)),
        capacity_(capacity),
        row_bytes_(bytes_of_row(args.tokens)),
        stream_(streams(args.permuted.rows() * row_bytes_)),
        workers_(team_for(ctx, T_, args.permuted.rows() * row_bytes_ + T_ * E_)),
        parts_(workers_ == 1 ? 1 : std::clamp<int64_t>(workers_ * kPartsPerWorker, 1, T_)),
        kernels_(row_kernels(ctx.isa())),
        places_(workers_, E_),
        to_count_(parts_, 1),
        to_write_(parts_, 1) {}

  Status run(Context& ctx) {
    Carver sizes;
    lay_out(sizes);
    void* scratch = nullptr;
    MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(sizes.bytes(), &scratch));
    Carver arrays(scratch);
    lay_out(arrays);
    run_team(workers_, [this](const Team& team) { work(team); });

    ArgCheck check("permute_with_map");
    check.require(rows_fit(),
                  "permuted.shape[0] = %" PRId64 ", expected M = %" PRId64 " (from map)",
                  args_.permuted.dim(0), chosen_);
    return check.finish();
  }

 private:
  // The parts of one worker may be slow ones; another then takes the next.
  static constexpr int64_t kPartsPerWorker = 8;

  void lay_out(Carver& scratch) {
    places_.lay_out(scratch);
    chosen_before_ = scratch.take<int64_t>(parts_ + 1, E_);
    first_row_ = scratch.take<int64_t>(E_);
  }

  bool rows_fit() const { return args_.drop_and_pad || chosen_ == args_.permuted.dim(0); }
  int64_t token_at(int64_t part) const { return T_ * part / parts_; }
  const uint8_t* map(int64_t t) const {
    return static_cast<const uint8_t*>(args_.map.data) + t * args_.map.row_stride;
  }

  void work(const Team& team) {
    for (int64_t part, end; to_count_.next(&part, &end);) {
      int64_t* count = chosen_before_ + part * E_;
      std::fill(count, count + E_, 0);
      for (int64_t t = token_at(part); t < token_at(part + 1); ++t) {
        for_each_set(map(t), E_, [count](int64_t e) { ++count[e]; });
      }
    }
    team.barrier();
    if (team.worker == 0) merge();
    team.barrier();
    if (!rows_fit()) return;
    void** places = places_.of(team.worker);
    for (int64_t part, end; to_write_.next(&part, &end);) {
      int64_t* chosen = chosen_before_ + part * E_;
      for (int64_t t = token_at(part); t < token_at(part + 1); ++t) write_token(t, chosen, places);
    }
    if (stream_) kernels_.fence();
  }

  // Each part's counts become the tokens chosen before it; one part more has those of all.
  void merge() {
    int64_t* all = chosen_before_ + parts_ * E_;
    std::fill(all, all + E_, 0);
    for (int64_t part = 0; part < parts_; ++part) {
      for (int64_t e = 0; e < E_; ++e) {
        int64_t& count = chosen_before_[part * E_ + e];
        const int64_t before = all[e];
        all[e] += count;
        count = before;
      }
    }
    chosen_ = 0;
    for (int64_t e = 0; e < E_; ++e) {
      first_row_[e] = args_.drop_and_pad ? e * capacity_ : chosen_;
      chosen_ += all[e];
    }
  }

  void write_token(int64_t t, int64_t* chosen, void** places) {
    int64_t count = 0;
    const auto add = [&](int64_t e, int64_t position) {
      const int64_t row = first_row_[e] + position;
      places[count++] = row_at(args_.permuted, row);
      args_.sorted_indices.row<int32_t>(0)[row] = static_cast<int32_t>(t);
      if (args_.probs.present()) {
        args_.permuted_probs.row<float>(0)[row] = args_.probs.row<float>(t)[e];
      }
    };
    if (!args_.drop_and_pad) {
      for_each_set(map(t), E_, [&](int64_t e) { add(e, chosen[e]++); });
    } else {
      const int64_t* all = chosen_before_ + parts_ * E_;
      for (int64_t e = 0; e < E_; ++e) {
        // The padding comes after all that were chosen, t - chosen[e] tokens of it before this one.
        const int64_t position = map(t)[e] != 0 ? chosen[e]++ : all[e] + t - chosen[e];
        if (position < capacity_) add(e, position);
      }
    }
    kernels_.copy({row_at(args_.tokens, t), row_bytes_, places, count, stream_});
  }

  const PermuteWithMapArgs& args_;
  const int64_t T_;
  const int64_t E_;
  const int64_t capacity_;
  const int64_t row_bytes_;
  const bool stream_;
  const int workers_;
  const int64_t parts_;
  const RowKernels& kernels_;
  RowLists<void*> places_;  // of a token's rows in permuted
  Deal to_count_;
  Deal to_write_;

  int64_t chosen_ = 0;                // places that the map sets
  int64_t* chosen_before_ = nullptr;  // [parts + 1][E]
  int64_t* first_row_ = nullptr;      // [E]
};

Status check_unpermute(const UnpermuteWithMapArgs& args) {
  ArgCheck check("unpermute_with_map");
  Dim M{"M"}, H{"H"};
  const int64_t T = args.num_tokens;
  check.input("permuted", args.permuted, {DType::kF32, DType::kBf16, DType::kF16}, {M, H});
  check.input("sorted_indices", args.sorted_indices, {DType::kI32}, {M});
  check.optional_input("permuted_probs", args.permuted_probs, {DType::kF32}, {M});
  check.require(T >= 0, "num_tokens = %" PRId64 " is negative", T);
  Dim rows{"T", T, "num_tokens"};
  check.output("tokens", args.tokens, {args.permuted.dtype}, {rows, H});
  return check.finish();
}

}  // namespace

Status permute_with_map(Context& ctx, const PermuteWithMapArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  int64_t capacity = 0;
  MOEOPS_RETURN_IF_ERROR(check_permute(args, &capacity));
  if (args.map.dim(0) == 0 || args.map.dim(1) == 0) {
    ArgCheck check("permute_with_map");
    check.require(args.permuted.dim(0) == 0,
                  "permuted.shape[0] = %" PRId64 ", expected M = 0 (from map)",
                  args.permuted.dim(0));
    return check.finish();
  }
  return MapPermutation(ctx, args, capacity).run(ctx);
}

// The rows of each token are found by sorting them, stably, by their tokens; then each token's are
// summed, in their order.
Status unpermute_with_map(Context& ctx, const UnpermuteWithMapArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_unpermute(args));
  const int64_t T = args.num_tokens;
  const int64_t M = args.permuted.dim(0);
  if (M > INT32_MAX) {
    return {StatusCode::kUnsupported, "unpermute_with_map: M = %" PRId64 " does not fit in i32", M};
  }
  const int64_t row_bytes = T + M == 0 ? 0 : bytes_of_row(args.permuted);
  const int workers = team_for(ctx, T, (M + T) * row_bytes + M * 8);
  const RowKernels& kernels = row_kernels(ctx.isa());

  const ConstTensorView token_of_row(args.sorted_indices.data,
                                     TensorLayout(DType::kI32, {M, int64_t{1}}));
  SlotSort sort({token_of_row, T, 0, T, false}, workers);
  Carver sizes;
  sizes.take<int32_t>(M);
  sizes.take<RowTerm>(M);
  sizes.take<char>(sort.scratch_bytes());
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(sizes.bytes(), &scratch));
  Carver arrays(scratch);
  auto* rows = arrays.take<int32_t>(M);   // by (token, row)
  auto* terms = arrays.take<RowTerm>(M);  // of these rows
  sort.set_scratch(arrays.take<char>(sort.scratch_bytes()));

  const int64_t tokens_with_columns = args.permuted.columns() == 0 ? 0 : T;
  Deal tokens(tokens_with_columns,
              tokens_at_once(T, row_bytes * (M / std::max<int64_t>(T, 1) + 1), workers));
  run_team(workers, [&](const Team& team) {
    sort.count(team);
    if (sort.bad_slot() >= 0) return;
    sort.place(team, {.rows = M, .slot_of_row = rows});
    team.barrier();
    RowSum sum = {};
    sum.columns = args.permuted.columns();
    sum.stream = streams(T * row_bytes);
    for (int64_t begin, end; tokens.next(&begin, &end);) {
      int64_t group = sort.group_from(begin);
      const auto terms_of = [&](int64_t t, RowTerm*) {
        if (group == sort.groups() || sort.expert(group) != t) return RowTerms{};
        RowTerm* of_token = terms + sort.first(group);
        const int32_t* rows_of_token = rows + sort.first(group);
        const int64_t count = sort.count(group);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = rows_of_token[i];
          const float p =
              args.permuted_probs.present() ? args.permuted_probs.row<float>(0)[row] : 1.0f;
          of_token[i] = {row_at(args.permuted, row), nullptr, p};
        }
        ++group;
        return RowTerms{of_token, count};
      };
      sum_tokens(
          begin, end, nullptr, 0, terms_of, [&](int64_t t) { sum.out = row_at(args.tokens, t); },
          kernels.sum[float_index(args.tokens.dtype)], sum);
    }
    if (sum.stream) kernels.fence();
  });

  ArgCheck check("unpermute_with_map");
  if (const int64_t row = sort.bad_slot(); row >= 0) {
    check.require(false, "sorted_indices[%" PRId64 "] = %d is not in [0, %" PRId64 ")", row,
                  args.sorted_indices.row<int32_t>(0)[row], T);
  }
  return check.finish();
}

}  // namespace moeops

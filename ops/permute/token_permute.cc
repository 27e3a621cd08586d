// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/token_permute.h>

#include <algorithm>
#include <cinttypes>

#include "ops/core/arg_check.h"
#include "ops/core/carver.h"
#include "ops/core/team.h"
#include "ops/init_routing/slot_sort.h"
#include "ops/permute/row_kernels.h"
#include "ops/permute/rows.h"

namespace moeops {

using namespace routing_internal;  // NOLINT(google-build-using-namespace)

namespace {

int64_t rows_out(int64_t N, int64_t num_out_tokens) {
  if (num_out_tokens == 0) return N;
  return num_out_tokens > 0 ? std::min(N, num_out_tokens)
                            : std::max<int64_t>(0, N + num_out_tokens);
}

Status check_permute(const TokenPermuteArgs& args) {
  ArgCheck check("token_permute");
  Dim T{"T"}, H{"H"}, K{"K"};
  check.input("tokens", args.tokens, {DType::kF32, DType::kBf16, DType::kF16}, {T, H});
  check.input("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  const int64_t N = check.ok() ? T.value * K.value : 0;
  Dim M{"M", rows_out(N, args.num_out_tokens), "num_out_tokens"};
  check.output("permuted", args.permuted, {args.tokens.dtype}, {M, H});
  check.output("sorted_indices", args.sorted_indices, {DType::kI32}, {N});
  check.require(N <= INT32_MAX, "T * K = %" PRId64 " does not fit in i32", N);
  return check.finish();
}

Status check_unpermute(const TokenUnpermuteArgs& args) {
  ArgCheck check("token_unpermute");
  Dim M{"M"}, H{"H"}, T{"T"}, K{"K"};
  check.input("permuted", args.permuted, {DType::kF32, DType::kBf16, DType::kF16}, {M, H});
  if (args.probs.present()) {
    check.input("probs", args.probs, {DType::kF32}, {T, K});
  } else {
    K.value = 1;
  }
  check.output("tokens", args.tokens, {args.permuted.dtype}, {T, H});
  Dim N{"T * K", check.ok() ? T.value * K.value : 0, args.probs.present() ? "probs" : "tokens"};
  check.input("sorted_indices", args.sorted_indices, {DType::kI32}, {N});
  return check.finish();
}

}  // namespace

Status token_permute(Context& ctx, const TokenPermuteArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_permute(args));
  const int64_t T = args.expert_ids.dim(0);
  if (T == 0 || args.expert_ids.dim(1) == 0) return {};
  const int64_t K = args.expert_ids.dim(1);
  const int64_t M = args.permuted.dim(0);
  const int64_t row_bytes = bytes_of_row(args.tokens);
  const int workers = team_for(ctx, T, M * row_bytes + T * K * 8);
  const RowKernels& kernels = row_kernels(ctx.isa());

  constexpr int64_t kEveryExpert = int64_t{INT32_MAX} + 1;
  SlotSort sort({args.expert_ids, kEveryExpert, 0, kEveryExpert, false}, workers);
  RowLists<void*> places(workers, K);
  Carver sizes;
  places.lay_out(sizes);
  sizes.take<char>(sort.scratch_bytes());
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(sizes.bytes(), &scratch));
  Carver arrays(scratch);
  places.lay_out(arrays);
  sort.set_scratch(arrays.take<char>(sort.scratch_bytes()));

  Deal tokens(T, tokens_at_once(T, K * row_bytes, workers));
  run_team(workers, [&](const Team& team) {
    sort.count(team);
    if (sort.bad_slot() >= 0) return;
    auto* rows = args.sorted_indices.row<int32_t>(0);
    sort.place(team, {.rows = T * K, .row_of_slot = rows});
    team.barrier();
    void** to = places.of(team.worker);
    const bool stream = streams(M * row_bytes);
    for (int64_t begin, end; tokens.next(&begin, &end);) {
      for (int64_t t = begin; t < end; ++t) {
        int64_t count = 0;
        for (int64_t k = 0; k < K; ++k) {
          const int64_t row = rows[t * K + k];
          if (row < M) to[count++] = row_at(args.permuted, row);
        }
        kernels.copy({row_at(args.tokens, t), row_bytes, to, count, stream});
      }
    }
    if (stream) kernels.fence();
  });

  ArgCheck check("token_permute");
  if (const int64_t slot = sort.bad_slot(); slot >= 0) {
    check.require(false, "expert_ids[%" PRId64 ",%" PRId64 "] = %d is negative", slot / K, slot % K,
                  args.expert_ids.row<int32_t>(slot / K)[slot % K]);
  }
  return check.finish();
}

Status token_unpermute(Context& ctx, const TokenUnpermuteArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_unpermute(args));
  const int64_t T = args.tokens.dim(0);
  if (T == 0 || args.tokens.dim(1) == 0) return {};
  const int64_t K = args.probs.present() ? args.probs.dim(1) : 1;
  const int64_t M = args.permuted.dim(0);
  const int64_t row_bytes = bytes_of_row(args.permuted);
  const int workers = team_for(ctx, T, std::min(M + T, T * (K + 1)) * row_bytes + T * K * 8);
  const auto sum_rows = row_kernels(ctx.isa()).sum_fma[float_index(args.permuted.dtype)];

  RowLists<RowTerm> terms(workers, K, 2);
  Carver sizes;
  terms.lay_out(sizes);
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(sizes.bytes(), &scratch));
  Carver arrays(scratch);
  terms.lay_out(arrays);

  Deal tokens(T, tokens_at_once(T, (K + 1) * row_bytes, workers));
  const auto terms_of = [&](int64_t t, RowTerm* room) {
    const int32_t* rows = args.sorted_indices.row<int32_t>(0) + t * K;
    int64_t count = 0;
    for (int64_t k = 0; k < K; ++k) {
      const float p = args.probs.present() ? args.probs.row<float>(t)[k] : 1.0f;
      if (rows[k] < 0 || rows[k] >= M || p == 0.0f) continue;
      room[count++] = {row_at(args.permuted, rows[k]), nullptr, p};
    }
    return RowTerms{room, count};
  };
  run_team(workers, [&](const Team& team) {
    RowSum sum = {};
    sum.columns = args.permuted.columns();
    sum.stream = streams(T * row_bytes);
    for (int64_t begin, end; tokens.next(&begin, &end);) {
      sum_tokens(
          begin, end, terms.of(team.worker), K, terms_of,
          [&](int64_t t) { sum.out = row_at(args.tokens, t); }, sum_rows, sum);
    }
    if (sum.stream) row_kernels(ctx.isa()).fence();
  });
  return {};
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/guarded.h"
#include "ref/numeric.h"
#include "ref/rows.h"
#include "ref/slots.h"

namespace moeops::ref {

namespace {

int64_t rows_out(int64_t N, int64_t num_out_tokens) {
  if (num_out_tokens == 0) return N;
  return num_out_tokens > 0 ? std::min(N, num_out_tokens)
                            : std::max<int64_t>(0, N + num_out_tokens);
}

Status run_permute(const TokenPermuteArgs& args) {
  ArgCheck check("token_permute");
  Dim T{"T"}, H{"H"}, K{"K"};
  check.input("tokens", args.tokens, {DType::kF32, DType::kBf16, DType::kF16}, {T, H});
  check.input("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  const int64_t N = check.ok() ? T.value * K.value : 0;
  Dim M{"M", rows_out(N, args.num_out_tokens), "num_out_tokens"};
  check.output("permuted", args.permuted, {args.tokens.dtype}, {M, H});
  check.output("sorted_indices", args.sorted_indices, {DType::kI32}, {N});
  check.require(N <= INT32_MAX, "T * K = %" PRId64 " does not fit in i32", N);
  for (int64_t slot = 0; check.ok() && slot < N; ++slot) {
    const int64_t id = expert_of(args.expert_ids, slot);
    check.require(id >= 0, "expert_ids[%" PRId64 ",%" PRId64 "] = %" PRId64 " is negative",
                  slot / K.value, slot % K.value, id);
  }
  MOEOPS_RETURN_IF_ERROR(check.finish());

  const std::vector<int64_t> slots = sorted_slots(args.expert_ids, 0, INT64_MAX);
  for (int64_t i = 0; i < N; ++i) {
    const int64_t slot = slots[static_cast<size_t>(i)];
    args.sorted_indices.row<int32_t>(0)[slot] = static_cast<int32_t>(i);
    if (i < M.value) copy_row(args.tokens, slot / K.value, args.permuted, i);
  }
  return {};
}

Status run_unpermute(const TokenUnpermuteArgs& args) {
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
  MOEOPS_RETURN_IF_ERROR(check.finish());

  for (int64_t t = 0; t < T.value; ++t) {
    for (int64_t j = 0; j < H.value; ++j) {
      float acc = 0.0f;
      for (int64_t k = 0; k < K.value; ++k) {
        const int64_t row = args.sorted_indices.row<int32_t>(0)[t * K.value + k];
        const float p = args.probs.present() ? args.probs.row<float>(t)[k] : 1.0f;
        if (row < 0 || row >= M.value || p == 0.0f) continue;
        acc = std::fma(p, FloatRow(args.permuted, row)[j], acc);
      }
      store(args.tokens, t, j, acc);
    }
  }
  return {};
}

}  // namespace

Status token_permute(const TokenPermuteArgs& args) noexcept {
  return guarded("token_permute", [&] { return run_permute(args); });
}

Status token_unpermute(const TokenUnpermuteArgs& args) noexcept {
  return guarded("token_unpermute", [&] { return run_unpermute(args); });
}

}  // namespace moeops::ref

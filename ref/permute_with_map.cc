// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <cinttypes>
#include <cstdint>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/guarded.h"
#include "ref/numeric.h"
#include "ref/rows.h"

namespace moeops::ref {

namespace {

bool is_set(const ConstTensorView& map, int64_t t, int64_t e) {
  return map.row<uint8_t>(t)[e] != 0;
}

struct Row {
  int64_t token;
  int64_t expert;
};

// The rows that the call makes, in their order.
std::vector<Row> rows_of(ArgCheck& check, const PermuteWithMapArgs& args, int64_t T, int64_t E) {
  std::vector<Row> rows;
  int64_t capacity = T;
  if (args.drop_and_pad) {
    const int64_t total = args.num_out_tokens;
    if (T == 0 || E == 0) {
      check.require(total == 0,
                    "num_out_tokens = %" PRId64 ", expected 0 for T = %" PRId64 ", E = %" PRId64,
                    total, T, E);
      return rows;
    }
    check.require(total % E == 0, "num_out_tokens = %" PRId64 " is not a multiple of E = %" PRId64,
                  total, E);
    capacity = total / E;
    check.require(capacity >= 1 && capacity <= T,
                  "num_out_tokens / E = %" PRId64 " / %" PRId64 " is not in [1, T = %" PRId64 "]",
                  total, E, T);
  }
  for (int64_t e = 0; check.ok() && e < E; ++e) {
    std::vector<Row> chosen;
    for (const bool selected : {true, false}) {
      if (!selected && !args.drop_and_pad) continue;  // no padding
      for (int64_t t = 0; t < T; ++t) {
        if (is_set(args.map, t, e) == selected) chosen.push_back({t, e});
      }
    }
    if (static_cast<int64_t>(chosen.size()) > capacity)
      chosen.resize(static_cast<size_t>(capacity));
    rows.insert(rows.end(), chosen.begin(), chosen.end());
  }
  return rows;
}

Status run_permute(const PermuteWithMapArgs& args) {
  ArgCheck check("permute_with_map");
  Dim T{"T"}, H{"H"}, E{"E"};
  check.input("tokens", args.tokens, {DType::kF32, DType::kBf16, DType::kF16}, {T, H});
  check.input("map", args.map, {DType::kBool}, {T, E});
  check.optional_input("probs", args.probs, {DType::kF32}, {T, E});
  check.require(T.value <= INT32_MAX, "T = %" PRId64 " does not fit in i32", T.value);
  std::vector<Row> rows;
  if (check.ok()) rows = rows_of(check, args, T.value, E.value);
  Dim M{"M", static_cast<int64_t>(rows.size()), args.drop_and_pad ? "num_out_tokens" : "map"};
  check.output("permuted", args.permuted, {args.tokens.dtype}, {M, H});
  check.output("sorted_indices", args.sorted_indices, {DType::kI32}, {M});
  if (args.probs.present()) {
    check.output("permuted_probs", args.permuted_probs, {DType::kF32}, {M});
  } else {
    check.absent("permuted_probs", args.permuted_probs, "probs is not");
  }
  MOEOPS_RETURN_IF_ERROR(check.finish());

  for (int64_t i = 0; i < M.value; ++i) {
    const Row& row = rows[static_cast<size_t>(i)];
    copy_row(args.tokens, row.token, args.permuted, i);
    args.sorted_indices.row<int32_t>(0)[i] = static_cast<int32_t>(row.token);
    if (args.probs.present()) {
      args.permuted_probs.row<float>(0)[i] = args.probs.row<float>(row.token)[row.expert];
    }
  }
  return {};
}

Status run_unpermute(const UnpermuteWithMapArgs& args) {
  ArgCheck check("unpermute_with_map");
  Dim M{"M"}, H{"H"};
  const int64_t T = args.num_tokens;
  check.input("permuted", args.permuted, {DType::kF32, DType::kBf16, DType::kF16}, {M, H});
  check.input("sorted_indices", args.sorted_indices, {DType::kI32}, {M});
  check.optional_input("permuted_probs", args.permuted_probs, {DType::kF32}, {M});
  check.require(T >= 0, "num_tokens = %" PRId64 " is negative", T);
  Dim rows{"T", T, "num_tokens"};
  check.output("tokens", args.tokens, {args.permuted.dtype}, {rows, H});
  for (int64_t i = 0; check.ok() && i < M.value; ++i) {
    const int64_t t = args.sorted_indices.row<int32_t>(0)[i];
    check.require(t >= 0 && t < T,
                  "sorted_indices[%" PRId64 "] = %" PRId64 " is not in [0, %" PRId64 ")", i, t, T);
  }
  MOEOPS_RETURN_IF_ERROR(check.finish());

  std::vector<float> acc(static_cast<size_t>(T * H.value));
  for (int64_t i = 0; i < M.value; ++i) {
    const int64_t t = args.sorted_indices.row<int32_t>(0)[i];
    const float p = args.permuted_probs.present() ? args.permuted_probs.row<float>(0)[i] : 1.0f;
    for (int64_t j = 0; j < H.value; ++j) {
      float& sum = acc[static_cast<size_t>(t * H.value + j)];
      sum = sum + p * FloatRow(args.permuted, i)[j];
    }
  }
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t j = 0; j < H.value; ++j) {
      store(args.tokens, t, j, acc[static_cast<size_t>(t * H.value + j)]);
    }
  }
  return {};
}

}  // namespace

Status permute_with_map(const PermuteWithMapArgs& args) noexcept {
  return guarded("permute_with_map", [&] { return run_permute(args); });
}

Status unpermute_with_map(const UnpermuteWithMapArgs& args) noexcept {
  return guarded("unpermute_with_map", [&] { return run_unpermute(args); });
}

}  // namespace moeops::ref

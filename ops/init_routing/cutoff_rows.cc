// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/init_routing.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "ops/core/arg_check.h"

namespace moeops {

Status cutoff_rows(int64_t T, int64_t K, double topk_scaling_factor, int64_t floor_tokens,
                   int64_t* rows) noexcept {
  ArgCheck check("cutoff_rows");
  check.require(T >= 0, "T = %" PRId64 " is negative", T);
  check.require(K >= 0, "K = %" PRId64 " is negative", K);
  check.require(floor_tokens >= 0, "floor_tokens = %" PRId64 " is negative", floor_tokens);
  check.require(topk_scaling_factor > 0 && topk_scaling_factor <= 1,
                "topk_scaling_factor = %g is not in (0, 1]", topk_scaling_factor);
  int64_t all = 0;
  check.require(!__builtin_mul_overflow(T, K, &all), "T * K = %" PRId64 " * %" PRId64 " overflows",
                T, K);
  // K itself where the double product reaches it: a K next to 2^63 rounds up to what no int64_t is.
  const double scaled = std::trunc(static_cast<double>(K) * topk_scaling_factor);
  const int64_t sk =
      check.ok() && scaled < static_cast<double>(K) ? static_cast<int64_t>(scaled) : K;
  check.require(sk >= 1, "K * topk_scaling_factor = %" PRId64 " * %g keeps no expert of a token", K,
                topk_scaling_factor);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  int64_t kept = 0;
  const bool overflows = __builtin_mul_overflow(std::max(T, floor_tokens), sk, &kept);
  *rows = overflows ? all : std::min(all, kept);
  return {};
}

Status clip_cumsum(const ConstTensorView& cumsum, int64_t rows,
                   const TensorView& clipped) noexcept {
  ArgCheck check("clip_cumsum");
  Dim E{"E"};
  check.input("cumsum", cumsum, {DType::kI64}, {E});
  check.require(rows >= 0, "rows = %" PRId64 " is negative", rows);
  check.output("clipped", clipped, {DType::kI64}, {E});
  MOEOPS_RETURN_IF_ERROR(check.finish());

  for (int64_t e = 0; e < E.value; ++e) {
    clipped.row<int64_t>(0)[e] = std::min(cumsum.row<int64_t>(0)[e], rows);
  }
  return {};
}

}  // namespace moeops

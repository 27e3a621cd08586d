// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/packed_weights.h>
#include <omp.h>

#include <algorithm>
#include <cinttypes>

#include "ops/core/arg_check.h"

namespace moeops {

namespace {

// Widths that the kernels take; libxsmm's other widths change a row's bits with the row count.
int padded_width(int64_t columns) { return columns <= 32 ? 32 : columns <= 48 ? 48 : 64; }

}  // namespace

int PackedWeights::panel_width(int64_t panel) const {
  return padded_width(std::min<int64_t>(n_ - panel * kPanelColumns, kPanelColumns));
}

Status PackedWeights::create(DType dtype, int64_t experts, int64_t n, int64_t k,
                             PackedWeights* out) {
  if (dtype != DType::kF32) {
    return {StatusCode::kUnsupported, "PackedWeights: dtype %s; only f32 is packed so far",
            to_string(dtype)};
  }
  if (experts < 0 || n < 0 || k < 0) {
    return {StatusCode::kInvalidArgument,
            "PackedWeights: a size of [%" PRId64 ", %" PRId64 ", %" PRId64 "] is negative", experts,
            n, k};
  }
  const int64_t whole = n / kPanelColumns * kPanelColumns;
  const int64_t padded = n > whole ? whole + padded_width(n - whole) : n;
  // Experts start on 64-byte boundaries: panels are whole multiples of 32 floats, so they do.
  int64_t stride = 0;
  int64_t bytes = 0;
  if (n > INT64_MAX - kPanelColumns || __builtin_mul_overflow(padded, k, &stride) ||
      __builtin_mul_overflow(stride, experts, &bytes) ||
      __builtin_mul_overflow(bytes, size_of(dtype), &bytes)) {
    return {StatusCode::kInvalidArgument,
            "PackedWeights: the product of [%" PRId64 ", %" PRId64 ", %" PRId64 "] overflows",
            experts, n, k};
  }
  PackedWeights fresh;
  MOEOPS_RETURN_IF_ERROR(HugeBuffer::allocate(bytes, &fresh.buffer_));
  fresh.dtype_ = dtype;
  fresh.experts_ = experts;
  fresh.n_ = n;
  fresh.k_ = k;
  fresh.expert_stride_ = stride;
  *out = std::move(fresh);
  return {};
}

// Element (column, k) of the expert's weights lies at w[column * column_stride + k * k_stride].
void PackedWeights::pack_panel(int64_t expert, int64_t panel, const float* w, int64_t column_stride,
                               int64_t k_stride) {
  const int width = panel_width(panel);
  const int64_t first = panel * kPanelColumns;
  const int columns = static_cast<int>(std::min<int64_t>(n_ - first, kPanelColumns));
  auto* to = static_cast<float*>(buffer_.data()) + expert * expert_stride_ + first * k_;
  // Sixteen k at a time: a cache line of each column is read while its 4 KiB of output stay in L1.
  for (int64_t k0 = 0; k0 < k_; k0 += 16) {
    const int64_t k1 = std::min(k0 + 16, k_);
    for (int j = 0; j < columns; ++j) {
      const float* from = w + (first + j) * column_stride;
      for (int64_t k = k0; k < k1; ++k) to[k * width + j] = from[k * k_stride];
    }
  }
}

Status PackedWeights::pack_expert(int64_t expert, const ConstTensorView& w, bool transpose_w) {
  ArgCheck check("PackedWeights::pack_expert");
  check.require(dtype_ != DType::kNone, "nothing was created yet");
  check.require(expert >= 0 && expert < experts_, "expert = %" PRId64 " is not in [0, %" PRId64 ")",
                expert, experts_);
  if (transpose_w) {
    check.input("w", w, {dtype_}, {k_, n_});
  } else {
    check.input("w", w, {dtype_}, {n_, k_});
  }
  MOEOPS_RETURN_IF_ERROR(check.finish());
  for (int64_t panel = 0; panel < panels(); ++panel) {
    pack_panel(expert, panel, w.row<float>(0), transpose_w ? 1 : w.row_stride,
               transpose_w ? w.row_stride : 1);
  }
  return {};
}

Status PackedWeights::pack(Context& ctx, const ConstTensorView& w, bool transpose_w,
                           PackedWeights* out) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  ArgCheck check("PackedWeights::pack");
  Dim E{"E"}, rows{"rows"}, columns{"columns"};
  check.input("w", w, {DType::kF32, DType::kBf16, DType::kF16, DType::kS8}, {E, rows, columns});
  MOEOPS_RETURN_IF_ERROR(check.finish());
  PackedWeights fresh;
  MOEOPS_RETURN_IF_ERROR(create(w.dtype, E.value, transpose_w ? columns.value : rows.value,
                                transpose_w ? rows.value : columns.value, &fresh));
  const int64_t count = fresh.experts_ * fresh.panels();
#pragma omp parallel for num_threads(ctx.workers()) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t expert = i / fresh.panels();
    fresh.pack_panel(expert, i % fresh.panels(), w.row<float>(expert * rows.value),
                     transpose_w ? 1 : w.row_stride, transpose_w ? w.row_stride : 1);
  }
  *out = std::move(fresh);
  return {};
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/dynamic_quant_row.h"
#include "ref/guarded.h"
#include "ref/numeric.h"
#include "ref/rows.h"
#include "ref/slots.h"

namespace moeops::ref {

namespace {

void check_params(ArgCheck& check, const InitRoutingArgs& args, const ExpertRange& range,
                  int64_t T) {
  if (!check.ok()) return;
  const int64_t E = args.expert_count;
  check.require(E >= 0, "expert_count = %" PRId64 " is negative", E);
  check.require(range.begin >= 0 && range.begin <= range.end && range.end <= E,
                "expert_range = [%" PRId64 ", %" PRId64 ") does not lie in [0, %" PRId64 ")",
                range.begin, range.end, E);
  if (args.mode == RoutingMode::kDropless) {
    check.require(args.active_rows >= 0, "active_rows = %" PRId64 " is negative", args.active_rows);
    return;
  }
  check.require(args.capacity >= 1 && args.capacity <= std::max<int64_t>(T, 1),
                "capacity = %" PRId64 " is not in [1, %" PRId64 "]", args.capacity,
                std::max<int64_t>(T, 1));
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
  if (args.mode == RoutingMode::kDropPad) {
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

// v is scratch of H elements.
void write_row(const InitRoutingArgs& args, int64_t token, int64_t expert_in_range, int64_t row,
               std::vector<float>& v) {
  if (args.quant == RoutingQuant::kNone) {
    copy_row(args.x, token, args.expanded_x, row);
    if (args.scale.present()) {
      args.expanded_scale.row<float>(0)[row] = args.scale.row<float>(0)[token];
    }
    return;
  }
  const FloatRow x(args.x, token);
  const int64_t H = args.x.dim(1);
  int8_t* q = args.expanded_x.row<int8_t>(row);
  if (args.quant == RoutingQuant::kStatic) {
    const float scale = args.scale.row<float>(0)[0];
    const float offset = args.offset.row<float>(0)[0];
    for (int64_t j = 0; j < H; ++j) q[j] = quantise(x[j] * scale + offset, -128.0f);
    return;
  }
  const int64_t smooth = args.scale.dim(0) == 1 ? 0 : expert_in_range;
  for (int64_t j = 0; j < H; ++j) {
    v[static_cast<size_t>(j)] =
        args.scale.present() ? x[j] * args.scale.row<float>(smooth)[j] : x[j];
  }
  dynamic_quant_row(H, v.data(), q, args.expanded_scale.row<float>(0) + row);
}

void write_counts(const InitRoutingArgs& args, const std::vector<int64_t>& slots, int64_t begin) {
  const TensorView& out = args.expert_tokens;
  zero_rows(out);
  int64_t pairs = 0;
  for (int64_t slot : slots) {
    const int64_t id = expert_of(args.expert_ids, slot);
    if (args.counts != ExpertCounts::kKeyValue) {
      ++out.row<int64_t>(0)[id - begin];
      continue;
    }
    if (pairs == 0 || out.row<int64_t>(pairs - 1)[0] != id) out.row<int64_t>(pairs++)[0] = id;
    ++out.row<int64_t>(pairs - 1)[1];
  }
  if (args.counts == ExpertCounts::kCumsum) {
    for (int64_t e = 1; e < out.dim(0); ++e) out.row<int64_t>(0)[e] += out.row<int64_t>(0)[e - 1];
  }
}

Status run(const InitRoutingArgs& args) {
  ArgCheck check("init_routing");
  check.choice("mode", args.mode, RoutingMode::kDropPad);
  check.choice("counts", args.counts, ExpertCounts::kKeyValue);
  check.choice("row_index_type", args.row_index_type, RowIndexType::kScatter);
  check.choice("quant", args.quant, RoutingQuant::kDynamic);
  const bool drop_pad = args.mode == RoutingMode::kDropPad;
  const ExpertRange range = args.expert_range.value_or(ExpertRange{0, args.expert_count});
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
  check_expert_ids(check, args.expert_ids, args.expert_count, args.allow_masked);

  std::vector<int64_t> slots;
  if (check.ok()) slots = sorted_slots(args.expert_ids, range.begin, range.end);
  const auto A = static_cast<int64_t>(slots.size());
  const int64_t R = args.active_rows == 0 ? A : std::min(args.active_rows, A);
  check.require(drop_pad || args.expanded_x.dim(0) >= R,
                "expanded_x.shape[0] = %" PRId64 ", expected at least R = %" PRId64,
                args.expanded_x.dim(0), R);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  std::vector<float> v(static_cast<size_t>(H.value));
  if (drop_pad) {
    zero_rows(args.expanded_x);
    if (args.expanded_scale.present()) zero_rows(args.expanded_scale);
  }
  std::fill_n(args.row_index.row<int32_t>(0), N, -1);
  int64_t rows_in_use = 0;
  int64_t position = 0;  // of the slot among its expert's
  for (int64_t i = 0; i < A; ++i) {
    const int64_t slot = slots[static_cast<size_t>(i)];
    const int64_t id = expert_of(args.expert_ids, slot);
    const bool same = i > 0 && id == expert_of(args.expert_ids, slots[static_cast<size_t>(i - 1)]);
    position = same ? position + 1 : 0;
    if (drop_pad ? position >= args.capacity : i >= R) continue;
    const int64_t row = drop_pad ? id * args.capacity + position : i;
    write_row(args, slot / K.value, id - range.begin, row, v);
    if (args.row_index_type == RowIndexType::kGather) {
      args.row_index.row<int32_t>(0)[slot] = static_cast<int32_t>(row);
    } else {
      args.row_index.row<int32_t>(0)[row] = static_cast<int32_t>(slot);
    }
    ++rows_in_use;
  }
  if (args.counts != ExpertCounts::kNone) write_counts(args, slots, range.begin);
  if (args.valid_rows.present()) args.valid_rows.row<int64_t>(0)[0] = rows_in_use;
  if (args.dropped_rows.present()) {
    args.dropped_rows.row<int64_t>(0)[0] = (drop_pad ? N : A) - rows_in_use;
  }
  return {};
}

}  // namespace

Status init_routing(const InitRoutingArgs& args) noexcept {
  return guarded("init_routing", [&] { return run(args); });
}

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <cinttypes>
#include <cstdint>

#include "ops/core/arg_check.h"
#include "ref/numeric.h"

namespace moeops::ref {

namespace {

int64_t index_of(const FinalizeRoutingArgs& args, int64_t t, int64_t k, int64_t T, int64_t K) {
  return args.index_layout == IndexLayout::kRow ? t * K + k : k * T + t;
}

// The rows, and the experts of the slots that have one.
void check_slots(ArgCheck& check, const FinalizeRoutingArgs& args, int64_t T, int64_t K) {
  if (!check.ok()) return;
  const int64_t M = args.expanded.rows();
  for (int64_t t = 0; check.ok() && t < T; ++t) {
    for (int64_t k = 0; check.ok() && k < K; ++k) {
      const int64_t index = index_of(args, t, k, T, K);
      const int64_t row = args.row_index.row<int32_t>(0)[index];
      check.require(row >= -1 && row < M,
                    "row_index[%" PRId64 "] = %" PRId64 " is not in [-1, %" PRId64 ")", index, row,
                    M);
      if (!args.bias.present() || row == -1) continue;
      const int64_t id = args.expert_ids.row<int32_t>(t)[k];
      check.require(id >= 0 && id < args.bias.dim(0),
                    "expert_ids[%" PRId64 ",%" PRId64 "] = %" PRId64 " is not in [0, %" PRId64 ")",
                    t, k, id, args.bias.dim(0));
    }
  }
}

}  // namespace

Status finalize_routing(const FinalizeRoutingArgs& args) noexcept {
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
  check_slots(check, args, T.value, K.value);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  for (int64_t t = 0; t < T.value; ++t) {
    for (int64_t j = 0; j < H.value; ++j) {
      float acc = 0.0f;
      if (args.skip1.present()) acc = FloatRow(args.skip1, t)[j];
      if (args.skip2.present()) acc = acc + FloatRow(args.skip2, t)[j];
      for (int64_t k = 0; k < K.value; ++k) {
        const int64_t row = args.row_index.row<int32_t>(0)[index_of(args, t, k, T.value, K.value)];
        if (row == -1) continue;
        float v = FloatRow(args.expanded, row)[j];
        if (args.bias.present()) {
          v = v + FloatRow(args.bias, args.expert_ids.row<int32_t>(t)[k])[j];
        }
        const float scale = args.scales.present() ? args.scales.row<float>(t)[k] : 1.0f;
        acc = acc + scale * v;
      }
      store(args.out, t, j, acc);
    }
  }
  return {};
}

}  // namespace moeops::ref

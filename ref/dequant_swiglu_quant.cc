// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/dynamic_quant_row.h"
#include "ref/group_list.h"
#include "ref/guarded.h"
#include "ref/swiglu_row.h"

namespace moeops::ref {

namespace {

Status run(const DequantSwigluQuantArgs& args) {
  ArgCheck check("dequant_swiglu_quant");
  Dim M{"M"}, width{"2I"}, I{"I"}, E{"E"}, entries{"entries"};
  check.input("x", args.x, {DType::kI32}, {M, width});
  check_swiglu(check, args.swiglu, width, I);
  check_group_list_view(check, args.group_list, ListType::kCount, E, entries);
  check.input("weight_scale", args.weight_scale, {DType::kF32}, {E, width});
  check.input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {E, width});
  check.optional_input("quant_scale", args.quant_scale, {DType::kF32}, {E, I});
  check.output("q", args.q, {DType::kS8}, {M, I});
  check.output("scale", args.scale, {DType::kF32}, {M});
  const std::vector<Group> groups =
      read_group_list(check, args.group_list, ListType::kCount, E.value, M.value);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  std::vector<float> gate_up(static_cast<size_t>(width.value));
  std::vector<float> h(static_cast<size_t>(I.value));
  float* scale = args.scale.row<float>(0);
  int64_t row = 0;
  for (const Group& group : groups) {
    const int64_t e = group.expert;
    for (int64_t i = 0; i < group.rows; ++i, ++row) {
      for (int64_t j = 0; j < width.value; ++j) {
        auto sum = static_cast<uint32_t>(args.x.row<int32_t>(row)[j]);  // wraps
        if (args.bias.dtype == DType::kI32) {
          sum += static_cast<uint32_t>(args.bias.row<int32_t>(e)[j]);
        }
        float v = static_cast<float>(static_cast<int32_t>(sum)) *
                  args.weight_scale.row<float>(e)[j] * args.x_scale.row<float>(0)[row];
        if (args.bias.dtype == DType::kF32) v = v + args.bias.row<float>(e)[j];
        gate_up[static_cast<size_t>(j)] = v;
      }
      swiglu_row(args.swiglu, I.value, gate_up.data(), h.data());
      if (args.quant_scale.present()) {
        for (int64_t j = 0; j < I.value; ++j) {
          h[static_cast<size_t>(j)] *= args.quant_scale.row<float>(e)[j];
        }
      }
      dynamic_quant_row(I.value, h.data(), args.q.row<int8_t>(row), scale + row);
    }
  }
  for (; row < M.value; ++row) {
    std::fill_n(args.q.row<int8_t>(row), I.value, int8_t{0});
    scale[row] = 0.0f;
  }
  return {};
}

}  // namespace

Status dequant_swiglu_quant(const DequantSwigluQuantArgs& args) noexcept {
  return guarded("dequant_swiglu_quant", [&] { return run(args); });
}

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <cinttypes>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/group_list.h"
#include "ref/guarded.h"
#include "ref/numeric.h"
#include "ref/rows.h"

namespace moeops::ref {

namespace {

float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v < 0.0f ? 0.0f : v;  // NaN stays
    case Activation::kGeluTanh:
      return gelu_tanh(v);
    case Activation::kSilu:
      return silu(v);
  }
  return v;
}

void check_dtypes(ArgCheck& check, const Weights& weights, const GroupedMatmulArgs& args, Dim& K) {
  if (!check.ok()) return;
  const DType x = args.x.dtype;
  const DType y = args.y.dtype;
  check.require(weights.w.dtype == x, "x is %s, but w is %s", to_string(x),
                to_string(weights.w.dtype));
  if (x != DType::kS8) {
    check.require(y == DType::kF32 || (x == DType::kBf16 && y == DType::kBf16),
                  "x is %s, but y is %s", to_string(x), to_string(y));
    check.require(!args.bias.present() || args.bias.dtype == DType::kF32,
                  "bias is i32, but x is %s", to_string(x));
    check.absent("w_scale", weights.w_scale, "x is not s8");
    check.absent("x_scale", args.x_scale, "x is not s8");
  } else {
    check.require(K.value <= 65536,
                  "K = %" PRId64 " is more than 65536, beyond which s32 overflows", K.value);
    if (y == DType::kI32) {
      check.absent("w_scale", weights.w_scale, "y is i32");
      check.absent("x_scale", args.x_scale, "y is i32");
      check.require(!args.bias.present() || args.bias.dtype == DType::kI32,
                    "bias is f32, but y is i32");
      check.require(args.activation == Activation::kNone, "activation is given, but y is i32");
    } else {
      check.require(weights.w_scale.present(), "w_scale is missing");
    }
  }
  if (y != DType::kS8) check.absent("offset", args.offset, "y is not s8");
}

Status run(const Weights& weights, const GroupedMatmulArgs& args) {
  ArgCheck check("grouped_matmul");
  check.choice("activation", args.activation, Activation::kSilu);
  check.choice("uncovered", args.uncovered, Uncovered::kKeep);
  Dim M{"M"}, K{"K"}, E{"E"}, N{"N"}, G{"G"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kS8}, {M, K});
  if (weights.transpose_w) {
    check.input("w", weights.w, {DType::kF32, DType::kBf16, DType::kS8}, {E, K, N});
  } else {
    check.input("w", weights.w, {DType::kF32, DType::kBf16, DType::kS8}, {E, N, K});
  }
  check.optional_input("w_scale", weights.w_scale, {DType::kF32}, {E, N});
  check_group_list_view(check, args.group_list, args.list_type, E, G);
  check.optional_input("bias", args.bias, {DType::kF32, DType::kI32}, {E, N});
  check.optional_input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.optional_input("offset", args.offset, {DType::kF32}, {1});
  check.output("y", args.y, {DType::kF32, DType::kBf16, DType::kI32, DType::kS8}, {M, N});
  check_dtypes(check, weights, args, K);
  const std::vector<Group> groups =
      read_group_list(check, args.group_list, args.list_type, E.value, M.value);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  const float offset = args.offset.present() ? args.offset.row<float>(0)[0] : 0.0f;
  int64_t row = 0;
  for (const Group& group : groups) {
    for (int64_t i = 0; i < group.rows; ++i, ++row) {
      for (int64_t n = 0; n < N.value; ++n) {
        const int64_t e = group.expert;
        // Element (e, n, k) of w lies at row w_row(k), column w_column(k).
        const auto w_row = [&](int64_t k) {
          return weights.transpose_w ? e * K.value + k : e * N.value + n;
        };
        const auto w_column = [&](int64_t k) { return weights.transpose_w ? n : k; };

        float v;
        if (args.x.dtype == DType::kS8) {
          uint32_t acc = 0;  // s32, wrapping where the bias makes it wrap
          for (int64_t k = 0; k < K.value; ++k) {
            acc += static_cast<uint32_t>(args.x.row<int8_t>(row)[k] *
                                         weights.w.row<int8_t>(w_row(k))[w_column(k)]);
          }
          if (args.bias.dtype == DType::kI32) {
            acc += static_cast<uint32_t>(args.bias.row<int32_t>(e)[n]);
          }
          const auto exact = static_cast<int32_t>(acc);
          if (args.y.dtype == DType::kI32) {
            args.y.row<int32_t>(row)[n] = exact;
            continue;
          }
          v = static_cast<float>(exact) * weights.w_scale.row<float>(e)[n];
          if (args.x_scale.present()) v = v * args.x_scale.row<float>(0)[row];
        } else {
          double sum = 0;
          for (int64_t k = 0; k < K.value; ++k) {
            sum += static_cast<double>(FloatRow(args.x, row)[k]) *
                   static_cast<double>(FloatRow(weights.w, w_row(k))[w_column(k)]);
          }
          v = static_cast<float>(sum);
        }
        if (args.bias.dtype == DType::kF32) v = v + args.bias.row<float>(e)[n];
        v = activate(args.activation, v);
        if (args.y.dtype == DType::kS8) {
          args.y.row<int8_t>(row)[n] = quantise(v + offset, -128.0f);
        } else {
          store(args.y, row, n, v);
        }
      }
    }
  }
  if (args.uncovered == Uncovered::kZero) zero_rows(args.y, row);
  return {};
}

}  // namespace

Status grouped_matmul(const Weights& weights, const GroupedMatmulArgs& args) noexcept {
  return guarded("grouped_matmul", [&] { return run(weights, args); });
}

}  // namespace moeops::ref

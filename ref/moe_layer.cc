// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/dynamic_quant_row.h"
#include "ref/guarded.h"
#include "ref/numeric.h"
#include "ref/rows.h"
#include "ref/swiglu_row.h"

namespace moeops::ref {

namespace {

using Row = std::vector<float>;

Row row_of(int64_t n) { return Row(static_cast<size_t>(n)); }

// A GEMM's input row, as its weights want it: in f32, rounded to bf16, or quantised.
class GemmInput {
 public:
  GemmInput(DType dtype, int64_t n)
      : data_(static_cast<size_t>(n * size_of(dtype))),
        values_(data_.data(), TensorLayout(dtype, {1, n})) {}
  GemmInput(const GemmInput&) = delete;
  GemmInput& operator=(const GemmInput&) = delete;

  void set(const Row& v) {
    const auto n = static_cast<int64_t>(v.size());
    if (values_.dtype == DType::kS8) {
      dynamic_quant_row(n, v.data(), values_.row<int8_t>(0), &scale_);
    } else {
      for (int64_t j = 0; j < n; ++j) store(values_, 0, j, v[static_cast<size_t>(j)]);
    }
  }

  const TensorView& values() const { return values_; }
  ConstTensorView scale() const {
    return values_.dtype == DType::kS8 ? ConstTensorView(&scale_, {1}) : ConstTensorView();
  }

 private:
  std::vector<char> data_;
  TensorView values_;
  float scale_ = 0.0f;
};

// The part of a view [E, N, K] or [E, N] that belongs to expert e, as [1, N, K] or [1, N].
ConstTensorView of_expert(const ConstTensorView& view, int64_t e) {
  if (!view.present()) return {};
  const int64_t rows = view.rank == 3 ? view.dim(1) : 1;
  ConstTensorView part = view;
  part.shape[0] = 1;
  part.data = offset(view.row<char>(0), e * rows * view.row_stride * size_of(view.dtype));
  return part;
}

// The experts of one width, routed or shared, and what they computed for the last row.
struct Experts {
  Experts(const ConstTensorView& w13_view, const ConstTensorView& w2_view)
      : w13(w13_view),
        w2(w2_view),
        gate_up(row_of(w13.dim(1))),
        h(row_of(w2.dim(2))),
        h_in(w2.dtype, w2.dim(2)),
        y(row_of(w2.dim(1))) {}

  Status run(const SwigluParams& swiglu, int64_t e, const GemmInput& x) {
    MOEOPS_RETURN_IF_ERROR(gemm(w13, w13_scale, b13, e, x, gate_up));
    swiglu_row(swiglu, w2.dim(2), gate_up.data(), h.data());
    h_in.set(h);
    return gemm(w2, w2_scale, b2, e, h_in, y);
  }

  ConstTensorView w13, w2;
  ConstTensorView w13_scale, w2_scale, b13, b2;
  Row gate_up;
  Row h;
  GemmInput h_in;
  Row y;

 private:
  // A grouped_matmul of one row and one expert.
  static Status gemm(const ConstTensorView& w, const ConstTensorView& w_scale,
                     const ConstTensorView& bias, int64_t e, const GemmInput& x, Row& y) {
    const int64_t one_row = 1;
    GroupedMatmulArgs args;
    args.x = x.values();
    args.x_scale = x.scale();
    args.group_list = {&one_row, {1}};
    args.bias = of_expert(bias, e);
    args.y = {y.data(), {1, static_cast<int64_t>(y.size())}};
    return grouped_matmul({of_expert(w, e), false, of_expert(w_scale, e)}, args);
  }
};

template <class T>
void copy_row(const TensorView& stage, int64_t row, const T* values) {
  if (stage.present()) std::copy_n(values, stage.columns(), stage.row<T>(row));
}

// For a stage [N], the scale of each slot.
void copy_scale(const TensorView& stage, int64_t i, const GemmInput& input) {
  if (stage.present()) stage.row<float>(0)[i] = *input.scale().row<float>(0);
}

bool is_masked(int64_t id, int64_t experts) { return id == -1 || id == experts; }

void check_ids(ArgCheck& check, const MoeLayerArgs& args, int64_t experts) {
  for (int64_t t = 0; check.ok() && t < args.expert_ids.dim(0); ++t) {
    for (int64_t k = 0; check.ok() && k < args.expert_ids.dim(1); ++k) {
      const int64_t id = args.expert_ids.row<int32_t>(t)[k];
      check.require((id >= 0 && id < experts) || (args.allow_masked && is_masked(id, experts)),
                    "expert_ids[%" PRId64 ",%" PRId64 "] = %" PRId64 " is not in [0, %" PRId64
                    ")%s",
                    t, k, id, experts, args.allow_masked ? ", nor does it mask" : "");
    }
  }
}

// One GEMM's weights [E, N, K] and, in s8, their scale [E, N].
void check_weights(ArgCheck& check, const char* name, const ConstTensorView& w,
                   const char* scale_name, const ConstTensorView& scale, DType w13, Dim& E, Dim& N,
                   Dim& K) {
  check.input(name, w, {DType::kF32, DType::kBf16, DType::kS8}, {E, N, K});
  check.require(w.dtype == w13, "%s is %s, but w13 is %s", name, to_string(w.dtype),
                to_string(w13));
  if (w13 != DType::kS8) {
    check.absent(scale_name, scale, "the weights are not s8");
    return;
  }
  check.input(scale_name, scale, {DType::kF32}, {E, N});
  check.require(K.value <= 65536,
                "%s = %" PRId64 " (%s) is more than 65536, beyond which s32 overflows", K.name,
                K.value, name);
}

Status run(const MoeLayerWeights& weights, const MoeLayerArgs& args) {
  const DType w_dtype = weights.w13.dtype;
  const bool has_shared = weights.shared_w13.present() || weights.shared_w2.present();
  const MoeLayerStages& stages = args.stages;

  ArgCheck check("moe_layer");
  Dim T{"T"}, H{"H"}, K{"K"}, E{"E"}, width{"2I"}, I{"I"}, S{"S"}, shared_width{"2Is"}, Is{"Is"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {T, H});
  check.input("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  check.input("weights", args.weights, {DType::kF32}, {T, K});
  check_weights(check, "w13", weights.w13, "w13_scale", weights.w13_scale, w_dtype, E, width, H);
  check_swiglu(check, args.swiglu, width, I);
  check_weights(check, "w2", weights.w2, "w2_scale", weights.w2_scale, w_dtype, E, H, I);
  check.require(w_dtype == DType::kS8 || args.x.dtype == w_dtype, "x is %s, but w13 is %s",
                to_string(args.x.dtype), to_string(w_dtype));
  check.optional_input("b13", args.b13, {DType::kF32}, {E, width});
  check.optional_input("b2", args.b2, {DType::kF32}, {E, H});
  if (has_shared) {
    check_weights(check, "shared_w13", weights.shared_w13, "shared_w13_scale",
                  weights.shared_w13_scale, w_dtype, S, shared_width, H);
    check_swiglu(check, args.swiglu, shared_width, Is);
    check_weights(check, "shared_w2", weights.shared_w2, "shared_w2_scale", weights.shared_w2_scale,
                  w_dtype, S, H, Is);
    check.optional_output("stage.shared", stages.shared, {DType::kF32}, {T, H});
  } else {
    check.absent("shared_w13_scale", weights.shared_w13_scale, "shared_w13 is missing");
    check.absent("shared_w2_scale", weights.shared_w2_scale, "shared_w2 is missing");
    check.absent("stage.shared", stages.shared, "shared_w13 is missing");
  }
  check.output("out", args.out, {args.x.dtype}, {T, H});
  Dim N{"N", check.ok() ? T.value * K.value : 0, "expert_ids"};
  check.optional_output("stage.h", stages.h, {DType::kF32}, {N, I});
  check.optional_output("stage.y", stages.y, {DType::kF32}, {N, H});
  if (w_dtype == DType::kS8) {
    check.optional_output("stage.x_q", stages.x_q, {DType::kS8}, {T, H});
    check.optional_output("stage.x_scale", stages.x_scale, {DType::kF32}, {T});
    check.optional_output("stage.h_q", stages.h_q, {DType::kS8}, {N, I});
    check.optional_output("stage.h_scale", stages.h_scale, {DType::kF32}, {N});
  } else {
    check.absent("stage.x_q", stages.x_q, "the weights are not s8");
    check.absent("stage.x_scale", stages.x_scale, "the weights are not s8");
    check.absent("stage.h_q", stages.h_q, "the weights are not s8");
    check.absent("stage.h_scale", stages.h_scale, "the weights are not s8");
  }
  check.require(!args.weight_on_input || K.value == 1,
                "weight_on_input is for K = 1, but K = %" PRId64 " (from expert_ids)", K.value);
  check_ids(check, args, E.value);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  Experts routed(weights.w13, weights.w2);
  routed.w13_scale = weights.w13_scale;
  routed.w2_scale = weights.w2_scale;
  routed.b13 = args.b13;
  routed.b2 = args.b2;
  Experts shared(weights.shared_w13, weights.shared_w2);
  shared.w13_scale = weights.shared_w13_scale;
  shared.w2_scale = weights.shared_w2_scale;

  for (const TensorView* stage : {&stages.x_q, &stages.x_scale, &stages.h, &stages.h_q,
                                  &stages.h_scale, &stages.y, &stages.shared}) {
    zero_rows(*stage);
  }
  const auto h_size = static_cast<size_t>(H.value);
  Row x(h_size), seen(h_size), acc(h_size);
  GemmInput routed_in(w_dtype, H.value), shared_in(w_dtype, H.value);
  for (int64_t t = 0; t < T.value; ++t) {
    const int32_t* ids = args.expert_ids.row<int32_t>(t);
    const float* weight = args.weights.row<float>(t);
    for (size_t j = 0; j < h_size; ++j) x[j] = FloatRow(args.x, t)[static_cast<int64_t>(j)];
    std::fill(acc.begin(), acc.end(), 0.0f);

    if (!args.weight_on_input || !is_masked(ids[0], E.value)) {
      for (size_t j = 0; j < h_size; ++j) seen[j] = args.weight_on_input ? x[j] * weight[0] : x[j];
      routed_in.set(seen);
      copy_row(stages.x_q, t, routed_in.values().row<int8_t>(0));
      copy_scale(stages.x_scale, t, routed_in);
    }
    for (int64_t k = 0; k < K.value; ++k) {
      if (is_masked(ids[k], E.value)) continue;
      const int64_t slot = t * K.value + k;
      MOEOPS_RETURN_IF_ERROR(routed.run(args.swiglu, ids[k], routed_in));
      copy_row(stages.h, slot, routed.h.data());
      copy_row(stages.h_q, slot, routed.h_in.values().row<int8_t>(0));
      copy_scale(stages.h_scale, slot, routed.h_in);
      copy_row(stages.y, slot, routed.y.data());
      for (size_t j = 0; j < h_size; ++j) {
        acc[j] = std::fma(args.weight_on_input ? 1.0f : weight[k], routed.y[j], acc[j]);
      }
    }
    if (has_shared) shared_in.set(x);
    for (int64_t s = 0; s < weights.shared_w13.dim(0); ++s) {
      MOEOPS_RETURN_IF_ERROR(shared.run(args.swiglu, s, shared_in));
      for (size_t j = 0; j < h_size; ++j) {
        acc[j] = acc[j] + shared.y[j];
        if (stages.shared.present()) stages.shared.row<float>(t)[j] += shared.y[j];
      }
    }
    for (size_t j = 0; j < h_size; ++j) store(args.out, t, static_cast<int64_t>(j), acc[j]);
  }
  return {};
}

}  // namespace

Status moe_layer(const MoeLayerWeights& weights, const MoeLayerArgs& args) noexcept {
  return guarded("moe_layer", [&] { return run(weights, args); });
}

}  // namespace moeops::ref

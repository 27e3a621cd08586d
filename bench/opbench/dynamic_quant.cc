// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include "bench/opbench/row_bench.h"

namespace moeops::bench {

namespace {

// The tokens of a layer, before its first GEMM.
class DynamicQuant final : public RowCase {
 public:
  explicit DynamicQuant(const RowLoad& load)
      : RowCase(load.tokens),
        smoothed_(load.variant == "smooth"),
        asymmetric_(load.variant == "asymmetric") {
    const int64_t T = load.tokens;
    const int64_t H = load.problem.hidden;
    x_ = floats("x", {load.dtype, {T, H}}, 4.0f);
    if (smoothed_) smooth_ = floats("smooth", {DType::kF32, {H}}, 2.0f);
    q_ = output("q", {DType::kS8, {T, H}});
    scale_ = output("scale", {DType::kF32, {T}});
    if (asymmetric_) offset_ = output("offset", {DType::kF32, {T}});
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.x = view(x_, inputs, rows);
    if (smoothed_) args_.smooth = view(smooth_, inputs);
    args_.asymmetric = asymmetric_;
    args_.q = view(q_, outputs, rows);
    args_.scale = view(scale_, outputs, rows);
    if (asymmetric_) args_.offset = view(offset_, outputs, rows);
  }

  Status run(Context* context) override {
    return context != nullptr ? dynamic_quant(*context, args_) : ref::dynamic_quant(args_);
  }

 private:
  bool smoothed_, asymmetric_;
  Id x_ = 0, smooth_ = 0, q_ = 0, scale_ = 0, offset_ = 0;
  DynamicQuantArgs args_;
};

}  // namespace

Operator dynamic_quant_operator() {
  return row_operator("dynamic_quant", {"bf16", "f32", "f16"},
                      {"symmetric", "smooth", "asymmetric"}, make_row_case<DynamicQuant>);
}

}  // namespace moeops::bench

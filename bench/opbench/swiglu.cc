// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>

#include "bench/opbench/row_bench.h"

namespace moeops::bench {

namespace {

const std::vector<std::string> kForms = {"silu", "swiglu_oai", "gelu_tanh"};

// GPT-OSS's form comes with its interleaved gate and up.
SwigluParams form_of(const std::string& variant) {
  SwigluParams params;
  if (variant == "swiglu_oai") {
    params.activation = GatedActivation::kSwigluOai;
    params.gate = Gate::kInterleaved;
  } else if (variant == "gelu_tanh") {
    params.activation = GatedActivation::kGeluTanh;
  }
  return params;
}

// What the first GEMM of a layer gives.
class Swiglu final : public RowCase {
 public:
  explicit Swiglu(const RowLoad& load) : RowCase(load.slots()) {
    const int64_t I = load.problem.intermediate;
    x_ = floats("x", {load.dtype, {load.slots(), 2 * I}}, 8.0f);
    y_ = output("y", {load.dtype, {load.slots(), I}}, rounded_to(load.dtype));
    args_.swiglu = form_of(load.variant);
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.x = view(x_, inputs, rows);
    args_.y = view(y_, outputs, rows);
  }

  Status run(Context* context) override {
    return context != nullptr ? swiglu(*context, args_) : ref::swiglu(args_);
  }

 private:
  Id x_, y_;
  SwigluArgs args_;
};

// The same of the s8 GEMM, sorted by experts.
class DequantSwigluQuant final : public RowCase {
 public:
  explicit DequantSwigluQuant(const RowLoad& load)
      : RowCase(load.slots()), counts_(load.counts()), some_counts_(counts_.size()) {
    const int64_t M = load.slots();
    const int64_t E = load.problem.experts;
    const int64_t I = load.problem.intermediate;
    x_ = integers("x", {DType::kI32, {M, 2 * I}}, 1 << 20);
    weight_scale_ = floats("weight_scale", {DType::kF32, {E, 2 * I}}, 0x1p-9f);
    x_scale_ = floats("x_scale", {DType::kF32, {M}}, 0x1p-7f);
    group_list_ = values("group_list", {E}, counts_);
    // A value half way between two may fall the other way.
    q_ = output("q", {DType::kS8, {M, I}}, {.absolute = 1});
    scale_ = output("scale", {DType::kF32, {M}}, {.relative = 1e-5});
    args_.swiglu = form_of(load.variant);
    const int64_t idle = std::count(counts_.begin(), counts_.end(), 0);
    read_bytes_ -= idle * 2 * I * size_of(DType::kF32);
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.x = view(x_, inputs, rows);
    args_.weight_scale = view(weight_scale_, inputs);
    args_.x_scale = view(x_scale_, inputs, rows);
    args_.group_list = view(group_list_, inputs);
    if (rows.count < this->rows()) {
      // Of every expert's rows, those that lie in the range.
      int64_t begin = 0;
      for (size_t e = 0; e < counts_.size(); ++e) {
        const int64_t end = begin + counts_[e];
        some_counts_[e] = std::max<int64_t>(
            0, std::min(end, rows.first + rows.count) - std::max(begin, rows.first));
        begin = end;
      }
      args_.group_list.data = some_counts_.data();
    }
    args_.q = view(q_, outputs, rows);
    args_.scale = view(scale_, outputs, rows);
  }

  Status run(Context* context) override {
    return context != nullptr ? dequant_swiglu_quant(*context, args_)
                              : ref::dequant_swiglu_quant(args_);
  }

 private:
  std::vector<int64_t> counts_, some_counts_;
  Id x_, weight_scale_, x_scale_, group_list_, q_, scale_;
  DequantSwigluQuantArgs args_;
};

}  // namespace

Operator swiglu_operator() {
  return row_operator("swiglu", {"bf16", "f32", "f16"}, kForms, make_row_case<Swiglu>);
}

Operator dequant_swiglu_quant_operator() {
  return row_operator("dequant_swiglu_quant", {"w8a8"}, kForms, make_row_case<DequantSwigluQuant>);
}

}  // namespace moeops::bench

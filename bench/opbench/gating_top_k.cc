// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>

#include "bench/opbench/row_bench.h"

namespace moeops::bench {

namespace {

// The problem's router, with its own parameters.
class GatingTopK final : public RowCase {
 public:
  explicit GatingTopK(const RowLoad& load)
      : RowCase(load.tokens),
        E_(load.problem.experts),
        has_bias_(load.problem.gating.bias),
        scores_(static_cast<size_t>(E_)) {
    const Gating& gating = load.problem.gating;
    args_.k = load.problem.top_k;
    args_.score = gating.score;
    args_.group_count = gating.group_count;
    args_.k_group = gating.k_group;
    args_.group_select = gating.group_select;
    args_.renormalize = gating.renormalize;
    args_.routed_scaling_factor = gating.routed_scaling_factor;
    logits_ = floats("logits", {load.dtype, {load.tokens, E_}}, 4.0f);
    if (has_bias_) bias_ = floats("bias", {DType::kF32, {E_}}, 0.1f);
    weights_ = output("weights", {DType::kF32, {load.tokens, args_.k}});
    expert_ids_ = output("expert_ids", {DType::kI32, {load.tokens, args_.k}});
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.logits = view(logits_, inputs, rows);
    if (has_bias_) args_.bias = view(bias_, inputs);
    args_.weights = view(weights_, outputs, rows);
    args_.expert_ids = view(expert_ids_, outputs, rows);
    args_.scores = {};
  }

  Status run(Context* context) override {
    return context != nullptr ? gating_top_k(*context, args_) : ref::gating_top_k(args_);
  }

  std::string check(const std::vector<Rows>& samples) override {
    std::string wrong;
    for (const Rows rows : samples) {
      for (int64_t t = rows.first; t < rows.first + rows.count && wrong.empty(); ++t) {
        wrong = check_token(t);
      }
    }
    return wrong;
  }

 private:
  std::string check_token(int64_t t) {
    bind(0, 1, {t, 1});
    args_.scores = {scores_.data(), {1, E_}};
    if (const Status status = run(nullptr); !status.ok()) return status.message();
    const auto* got = slice(view(expert_ids_, 0), t, 1).row<int32_t>(0);
    const auto* want = args_.expert_ids.row<int32_t>(0);
    bool same = true;
    for (int64_t k = 0; k < args_.k; ++k) {
      if (got[k] < 0 || got[k] >= E_ || std::count(got, got + args_.k, got[k]) != 1) {
        return fmt::format("expert_ids[{},{}] = {}: outside [0, {}), or twice", t, k, got[k], E_);
      }
      // Two experts whose scores differ by the error of exp may change places.
      if (got[k] != want[k] &&
          std::fabs(biased(got[k]) - biased(want[k])) > 1e-6f * std::fabs(biased(want[k]))) {
        return fmt::format("expert_ids[{},{}] = {}, expected {}", t, k, got[k], want[k]);
      }
      same = same && got[k] == want[k];
    }
    if (!same) return {};
    return compare("weights", slice(view(weights_, 0), t, 1), args_.weights,
                   rounded_to(DType::kF32), t);
  }

  float biased(int32_t expert) const {
    const auto e = static_cast<size_t>(expert);
    return scores_[e] + (has_bias_ ? args_.bias.row<float>(0)[e] : 0.0f);
  }

  int64_t E_;
  bool has_bias_;
  std::vector<float> scores_;
  Id logits_ = 0, bias_ = 0, weights_ = 0, expert_ids_ = 0;
  GatingTopKArgs args_;
};

}  // namespace

Operator gating_top_k_operator() {
  return row_operator("gating_top_k", {"f32", "bf16", "f16"}, {}, make_row_case<GatingTopK>);
}

}  // namespace moeops::bench

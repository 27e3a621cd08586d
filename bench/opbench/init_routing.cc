// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include "bench/opbench/row_bench.h"

namespace moeops::bench {

namespace {

// A layer's tokens to all of its experts.
class InitRouting final : public RowCase {
 public:
  explicit InitRouting(const RowLoad& load)
      : RowCase(load.tokens),
        top_k_(load.problem.top_k),
        sorted_(load.sorted_rows()),
        counts_(load.counts()) {
    const int64_t T = load.tokens;
    const int64_t H = load.problem.hidden;
    args_.quant = load.variant == "static"    ? RoutingQuant::kStatic
                  : load.variant == "dynamic" ? RoutingQuant::kDynamic
                                              : RoutingQuant::kNone;
    args_.expert_count = load.problem.experts;
    args_.counts = ExpertCounts::kCount;
    x_ = floats("x", {load.dtype, {T, H}}, 4.0f);
    expert_ids_ = values("expert_ids", {T, top_k_}, load.expert_ids);
    if (is(RoutingQuant::kStatic)) {
      scale_ = values("scale", {1}, std::vector<float>{25.0f});
      offset_ = values("offset", {1}, std::vector<float>{-3.0f});
    }
    const DType to = is(RoutingQuant::kNone) ? load.dtype : DType::kS8;
    expanded_x_ = output("expanded_x", {to, {load.slots(), H}});
    if (is(RoutingQuant::kDynamic)) {
      expanded_scale_ = output("expanded_scale", {DType::kF32, {load.slots()}});
    }
    row_index_ = output("row_index", {DType::kI32, {load.slots()}});
    expert_tokens_ = output("expert_tokens", {DType::kI64, {args_.expert_count}});
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.x = view(x_, inputs, rows);
    args_.expert_ids = view(expert_ids_, inputs, rows);
    if (is(RoutingQuant::kStatic)) {
      args_.scale = view(scale_, inputs);
      args_.offset = view(offset_, inputs);
    }
    args_.expanded_x = view(expanded_x_, outputs, rows);
    if (is(RoutingQuant::kDynamic)) args_.expanded_scale = view(expanded_scale_, outputs, rows);
    args_.row_index = view(row_index_, outputs, rows);
    args_.expert_tokens = view(expert_tokens_, outputs);
  }

  Status run(Context* context) override {
    return context != nullptr ? init_routing(*context, args_) : ref::init_routing(args_);
  }

  // Where every slot went, how many each expert has, and the rows of some tokens as the reference
  // makes them of each token alone.
  std::string check(const std::vector<Rows>& samples) override {
    const auto slots = static_cast<int64_t>(sorted_.size());
    std::string wrong =
        compare("row_index", view(row_index_, 0), {sorted_.data(), {DType::kI32, {slots}}}, {}, 0);
    if (wrong.empty()) {
      wrong = compare("expert_tokens", view(expert_tokens_, 0),
                      {counts_.data(), {DType::kI64, {args_.expert_count}}}, {}, 0);
    }
    for (const Rows tokens : samples) {
      for (int64_t t = tokens.first; t < tokens.first + tokens.count && wrong.empty(); ++t) {
        wrong = check_token(t);
      }
    }
    return wrong;
  }

 private:
  bool is(RoutingQuant quant) const { return args_.quant == quant; }

  std::string check_token(int64_t t) {
    bind(0, 1, {t, 1});
    if (const Status status = run(nullptr); !status.ok()) return status.message();
    std::string wrong;
    for (int64_t k = 0; k < top_k_ && wrong.empty(); ++k) {
      const int64_t row = sorted_[static_cast<size_t>(t * top_k_ + k)];
      const int64_t alone = args_.row_index.row<int32_t>(0)[k];
      wrong = compare("expanded_x", slice(view(expanded_x_, 0), row, 1),
                      slice(args_.expanded_x, alone, 1), {}, row);
      if (wrong.empty() && is(RoutingQuant::kDynamic)) {
        wrong = compare("expanded_scale", slice(view(expanded_scale_, 0), row, 1),
                        slice(args_.expanded_scale, alone, 1), {}, row);
      }
    }
    return wrong;
  }

  int64_t top_k_;
  std::vector<int32_t> sorted_;
  std::vector<int64_t> counts_;
  Id x_ = 0, expert_ids_ = 0, scale_ = 0, offset_ = 0;
  Id expanded_x_ = 0, expanded_scale_ = 0, row_index_ = 0, expert_tokens_ = 0;
  InitRoutingArgs args_;
};

}  // namespace

Operator init_routing_operator() {
  return row_operator("init_routing", {"bf16", "f32", "f16"}, {"none", "static", "dynamic"},
                      make_row_case<InitRouting>);
}

}  // namespace moeops::bench

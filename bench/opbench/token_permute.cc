// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include "bench/opbench/row_bench.h"

namespace moeops::bench {

namespace {

class TokenPermute final : public RowCase {
 public:
  explicit TokenPermute(const RowLoad& load)
      : RowCase(load.tokens), top_k_(load.problem.top_k), sorted_(load.sorted_rows()) {
    const int64_t T = load.tokens;
    const int64_t H = load.problem.hidden;
    tokens_ = floats("tokens", {load.dtype, {T, H}}, 1.0f);
    expert_ids_ = values("expert_ids", {T, top_k_}, load.expert_ids);
    permuted_ = output("permuted", {load.dtype, {load.slots(), H}});
    sorted_indices_ = output("sorted_indices", {DType::kI32, {load.slots()}});
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.tokens = view(tokens_, inputs, rows);
    args_.expert_ids = view(expert_ids_, inputs, rows);
    args_.permuted = view(permuted_, outputs, rows);
    args_.sorted_indices = view(sorted_indices_, outputs, rows);
  }

  Status run(Context* context) override {
    return context != nullptr ? token_permute(*context, args_) : ref::token_permute(args_);
  }

  // Where every slot went, and the rows of some tokens.
  std::string check(const std::vector<Rows>& samples) override {
    const auto slots = static_cast<int64_t>(sorted_.size());
    std::string wrong = compare("sorted_indices", view(sorted_indices_, 0),
                                {sorted_.data(), {DType::kI32, {slots}}}, {}, 0);
    for (const Rows tokens : samples) {
      for (int64_t slot = tokens.first * top_k_;
           slot < (tokens.first + tokens.count) * top_k_ && wrong.empty(); ++slot) {
        const int64_t row = sorted_[static_cast<size_t>(slot)];
        wrong = compare("permuted", slice(view(permuted_, 0), row, 1),
                        slice(view(tokens_, 0), slot / top_k_, 1), {}, row);
      }
    }
    return wrong;
  }

 private:
  int64_t top_k_;
  std::vector<int32_t> sorted_;
  Id tokens_, expert_ids_, permuted_, sorted_indices_;
  TokenPermuteArgs args_;
};

class TokenUnpermute final : public RowCase {
 public:
  explicit TokenUnpermute(const RowLoad& load) : RowCase(load.tokens) {
    const int64_t H = load.problem.hidden;
    permuted_ = floats("permuted", {load.dtype, {load.slots(), H}}, 1.0f);
    sorted_indices_ = values("sorted_indices", {load.slots()}, load.sorted_rows());
    probs_ = floats("probs", {DType::kF32, {load.tokens, load.problem.top_k}}, 1.0f);
    tokens_ = output("tokens", {load.dtype, {load.tokens, H}});
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.permuted = view(permuted_, inputs);
    args_.sorted_indices = view(sorted_indices_, inputs, rows);
    args_.probs = view(probs_, inputs, rows);
    args_.tokens = view(tokens_, outputs, rows);
  }

  Status run(Context* context) override {
    return context != nullptr ? token_unpermute(*context, args_) : ref::token_unpermute(args_);
  }

 private:
  Id permuted_, sorted_indices_, probs_, tokens_;
  TokenUnpermuteArgs args_;
};

}  // namespace

Operator token_permute_operator() {
  return row_operator("token_permute", {"bf16", "f32", "f16"}, {}, make_row_case<TokenPermute>);
}

Operator token_unpermute_operator() {
  return row_operator("token_unpermute", {"bf16", "f32", "f16"}, {}, make_row_case<TokenUnpermute>);
}

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/guarded.h"
#include "ref/numeric.h"

namespace moeops::ref {

namespace {

void softmax(const FloatRow& logits, std::vector<float>& n) {
  float max = -std::numeric_limits<float>::infinity();
  for (size_t e = 0; e < n.size(); ++e) max = std::fmax(max, logits[static_cast<int64_t>(e)]);
  float sum = 0.0f;
  for (size_t e = 0; e < n.size(); ++e) {
    n[e] = exp(logits[static_cast<int64_t>(e)] - max);  // NaN where the logit is, so in `sum`
    sum = sum + n[e];
  }
  for (float& value : n) value = value / sum;
}

// NaN comes after every number.
bool ranks_before(float a, float b) { return a > b || (!std::isnan(a) && std::isnan(b)); }

// The indices of `values`, best first; of equal values the lower index first.
void rank(const std::vector<float>& values, std::vector<size_t>& order) {
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return ranks_before(values[a], values[b]); });
}

// What a group of experts is judged by.
float score_of_group(const float* b, size_t size, GroupSelect select) {
  float best = b[0];
  float second = std::numeric_limits<float>::quiet_NaN();
  for (size_t i = 1; i < size; ++i) {
    if (ranks_before(b[i], best)) {
      second = best;
      best = b[i];
    } else if (ranks_before(b[i], second)) {
      second = b[i];
    }
  }
  return select == GroupSelect::kMax ? best : best + second;
}

void check_params(ArgCheck& check, const GatingTopKArgs& args, int64_t T, int64_t E) {
  if (!check.ok()) return;
  const int64_t groups = args.group_count;
  check.require(args.k >= 1, "k = %" PRId64 " is less than 1", args.k);
  check.require(groups >= 1, "group_count = %" PRId64 " is less than 1", groups);
  check.require(args.k_group >= 1 && args.k_group <= groups,
                "k_group = %" PRId64 " is not in [1, group_count = %" PRId64 "]", args.k_group,
                groups);
  if (!check.ok()) return;
  check.require(E % groups == 0,
                "group_count = %" PRId64 " does not divide the %" PRId64 " experts", groups, E);
  check.require(args.k <= E / groups * args.k_group,
                "k = %" PRId64 " is more than the %" PRId64 " experts to choose from", args.k,
                E / groups * args.k_group);
  check.require(groups == 1 || args.group_select != GroupSelect::kTop2Sum || E / groups >= 2,
                "group_select is top2_sum, but a group has %" PRId64 " expert", E / groups);
  check.require(E <= INT32_MAX, "E = %" PRId64 " does not fit in i32", E);
  check.require(!args.row_index.present() || T <= INT32_MAX / args.k,
                "row_index: T * K = %" PRId64 " * %" PRId64 " does not fit in i32", T, args.k);
}

Status run(const GatingTopKArgs& args) {
  ArgCheck check("gating_top_k");
  check.choice("score", args.score, GatingScore::kSigmoid);
  check.choice("group_select", args.group_select, GroupSelect::kTop2Sum);
  Dim T{"T"}, E{"E"}, K{"K", args.k, "k"};
  check.input("logits", args.logits, {DType::kF32, DType::kBf16, DType::kF16}, {T, E});
  check.optional_input("bias", args.bias, {DType::kF32}, {E});
  check.optional_input("finished", args.finished, {DType::kBool}, {T});
  check_params(check, args, T.value, E.value);
  check.output("weights", args.weights, {DType::kF32}, {T, K});
  check.output("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  check.optional_output("scores", args.scores, {DType::kF32}, {T, E});
  check.optional_output("row_index", args.row_index, {DType::kI32}, {T, K});
  MOEOPS_RETURN_IF_ERROR(check.finish());

  const auto experts = static_cast<size_t>(E.value);
  std::vector<float> n(experts);
  std::vector<float> b(experts);
  std::vector<size_t> order(experts);
  const auto groups = static_cast<size_t>(args.group_count);
  const size_t group_size = experts / groups;
  std::vector<float> group_scores(groups);
  std::vector<size_t> group_order(groups);
  for (int64_t t = 0; t < T.value; ++t) {
    const FloatRow logits(args.logits, t);
    if (args.score == GatingScore::kSoftmax) {
      softmax(logits, n);
    } else {
      for (size_t e = 0; e < experts; ++e) n[e] = sigmoid(logits[static_cast<int64_t>(e)]);
    }
    b = n;
    if (args.bias.present()) {
      for (size_t e = 0; e < experts; ++e) b[e] = n[e] + args.bias.row<float>(0)[e];
    }
    if (groups > 1) {
      for (size_t g = 0; g < groups; ++g) {
        group_scores[g] = score_of_group(&b[g * group_size], group_size, args.group_select);
      }
      rank(group_scores, group_order);
      for (size_t i = static_cast<size_t>(args.k_group); i < groups; ++i) {
        std::fill_n(&b[group_order[i] * group_size], group_size,
                    -std::numeric_limits<float>::infinity());
      }
    }
    rank(b, order);

    float sum = 0.0f;
    for (int64_t k = 0; k < K.value; ++k) sum = sum + n[order[static_cast<size_t>(k)]];
    const bool finished = args.finished.present() && args.finished.row<uint8_t>(0)[t] != 0;
    for (int64_t k = 0; k < K.value; ++k) {
      const size_t id = order[static_cast<size_t>(k)];
      const float y = args.renormalize ? n[id] / (sum + args.eps) : n[id];
      args.weights.row<float>(t)[k] = y * args.routed_scaling_factor;
      args.expert_ids.row<int32_t>(t)[k] = static_cast<int32_t>(finished ? experts : id);
      if (args.row_index.present()) {
        args.row_index.row<int32_t>(t)[k] = static_cast<int32_t>(k * T.value + t);
      }
    }
    if (args.scores.present()) std::copy(n.begin(), n.end(), args.scores.row<float>(t));
  }
  return {};
}

}  // namespace

Status gating_top_k(const GatingTopKArgs& args) noexcept {
  return guarded("gating_top_k", [&] { return run(args); });
}

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0

// A trained model's MoE blocks, recorded in another framework: the reference must give the same
// routing and the same outputs.

#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "tests/support/tiny_moe.h"

namespace moeops {
namespace {

class TinyMoe : public testing::TestWithParam<int>, public test::TinyMoe {
 protected:
  TinyMoe() : test::TinyMoe(GetParam()) {}
};

TEST_P(TinyMoe, Routing) {
  std::vector<float> logits;
  for (size_t t = 0; t < kT; ++t) {
    for (size_t e = 0; e < kE; ++e) {
      double sum = 0;
      for (size_t h = 0; h < kH; ++h) {
        sum += static_cast<double>(x[t * kH + h]) * static_cast<double>(gate[e * kH + h]);
      }
      logits.push_back(static_cast<float>(sum));
    }
  }
  std::vector<float> got_weights(kT * kK), scores(kT * kE);
  std::vector<int32_t> got_ids(kT * kK);
  GatingTopKArgs args;
  args.logits = {logits.data(), {kT, kE}};
  args.k = kK;
  args.renormalize = true;
  args.weights = {got_weights.data(), {kT, kK}};
  args.expert_ids = {got_ids.data(), {kT, kK}};
  args.scores = {scores.data(), {kT, kE}};
  const Status status = ref::gating_top_k(args);
  ASSERT_TRUE(status.ok()) << status.message();

  int compared = 0;
  for (size_t t = 0; t < kT; ++t) {
    std::vector<float> ranked(scores.begin() + static_cast<int64_t>(t * kE),
                              scores.begin() + static_cast<int64_t>((t + 1) * kE));
    std::sort(ranked.begin(), ranked.end(), std::greater<>());
    if (ranked[kK - 1] - ranked[kK] <= 1e-5f) continue;  // the recorder may have chosen the other
    ++compared;
    for (size_t k = 0; k < kK; ++k) {
      // By id: near-ties within the four may have been ranked the other way.
      const auto first = got_ids.begin() + static_cast<int64_t>(t * kK);
      const auto it = std::find(first, first + kK, ids[t * kK + k]);
      ASSERT_NE(it, first + kK) << "token " << t << " lacks expert " << ids[t * kK + k];
      // The recorder's logits are f32 sums of 128 products, off by some 1e-6; so are the weights.
      EXPECT_NEAR(got_weights[static_cast<size_t>(it - got_ids.begin())], weights[t * kK + k], 1e-5)
          << "token " << t;
    }
  }
  EXPECT_GT(compared, kT * 9 / 10);
}

TEST_P(TinyMoe, Outputs) {
  std::vector<float> got(kT * kH);
  ref::MoeLayerWeights layer;
  layer.w13 = {w13.data(), {kE, 2 * kI, kH}};
  layer.w2 = {w2.data(), {kE, kH, kI}};
  MoeLayerArgs args;
  args.x = {x.data(), {kT, kH}};
  args.expert_ids = {ids.data(), {kT, kK}};
  args.weights = {weights.data(), {kT, kK}};
  args.out = {got.data(), {kT, kH}};
  const Status status = ref::moe_layer(layer, args);
  ASSERT_TRUE(status.ok()) << status.message();

  // The recorder sums in f32. Partial sums reach the size of the largest output, a rounding is up
  // to 2^-24 of that, and the 64 of a GEMM make a random walk of 8; as much again for the GEMM
  // before.
  float largest = 0;
  for (const float v : out) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < out.size(); ++i) {
    ASSERT_NEAR(got[i], out[i], 16 * 0x1p-24f * largest) << "token " << i / kH;
  }
}

INSTANTIATE_TEST_SUITE_P(Layers, TinyMoe, testing::Values(0, 1));

}  // namespace
}  // namespace moeops

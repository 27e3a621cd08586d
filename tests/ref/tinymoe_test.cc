// SPDX-License-Identifier: Apache-2.0

// A trained model's MoE blocks, recorded in another framework: the reference must give the same
// routing and the same outputs.

#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tools/tensor_file/safetensors.h"

namespace moeops {
namespace {

using tools::SafetensorsFile;

constexpr int64_t kT = 384, kH = 128, kI = 64, kE = 32, kK = 4;

class TinyMoe : public testing::TestWithParam<int> {
 protected:
  static SafetensorsFile open(const std::string& name) {
    return SafetensorsFile::open(std::string(MOEOPS_TEST_DATA_DIR "/tinymoe/") + name);
  }
  // Appends a tensor's elements as f32; bf16 becomes f32 exactly.
  static void append(const SafetensorsFile& file, const std::string& name,
                     std::vector<float>& values) {
    const tools::TensorRef* tensor = file.find(name);
    if (tensor == nullptr) throw std::runtime_error("no tensor " + name);
    for (int64_t i = 0; i < tensor->numel(); ++i) {
      values.push_back(static_cast<float>(tools::element(*tensor, i)));
    }
  }
  std::vector<float> recorded(const std::string& name) const {
    std::vector<float> values;
    append(io_, "layers." + std::to_string(GetParam()) + "." + name, values);
    return values;
  }
  std::vector<int32_t> recorded_ids() const {
    std::vector<int32_t> ids;
    for (const float id : recorded("expert_ids")) ids.push_back(static_cast<int32_t>(id));
    return ids;
  }
  std::string mlp(const std::string& name) const {
    return "model.layers." + std::to_string(GetParam()) + ".mlp." + name + ".weight";
  }

  const SafetensorsFile model_ = open("model.safetensors");
  const SafetensorsFile io_ = open("moe_io.safetensors");
};

TEST_P(TinyMoe, Routing) {
  const std::vector<float> x = recorded("x");
  std::vector<float> gate;
  append(model_, mlp("gate"), gate);
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
  std::vector<float> weights(kT * kK), scores(kT * kE);
  std::vector<int32_t> ids(kT * kK);
  GatingTopKArgs args;
  args.logits = {logits.data(), {kT, kE}};
  args.k = kK;
  args.renormalize = true;
  args.weights = {weights.data(), {kT, kK}};
  args.expert_ids = {ids.data(), {kT, kK}};
  args.scores = {scores.data(), {kT, kE}};
  const Status status = ref::gating_top_k(args);
  ASSERT_TRUE(status.ok()) << status.message();

  const std::vector<int32_t> expected_ids = recorded_ids();
  const std::vector<float> expected_weights = recorded("weights");
  int compared = 0;
  for (size_t t = 0; t < kT; ++t) {
    std::vector<float> ranked(scores.begin() + static_cast<int64_t>(t * kE),
                              scores.begin() + static_cast<int64_t>((t + 1) * kE));
    std::sort(ranked.begin(), ranked.end(), std::greater<>());
    if (ranked[kK - 1] - ranked[kK] <= 1e-5f) continue;  // the recorder may have chosen the other
    ++compared;
    for (size_t k = 0; k < kK; ++k) {
      // By id: near-ties within the four may have been ranked the other way.
      const auto first = ids.begin() + static_cast<int64_t>(t * kK);
      const auto it = std::find(first, first + kK, expected_ids[t * kK + k]);
      ASSERT_NE(it, first + kK) << "token " << t << " lacks expert " << expected_ids[t * kK + k];
      // The recorder's logits are f32 sums of 128 products, off by some 1e-6; so are the weights.
      EXPECT_NEAR(weights[static_cast<size_t>(it - ids.begin())], expected_weights[t * kK + k],
                  1e-5)
          << "token " << t;
    }
  }
  EXPECT_GT(compared, kT * 9 / 10);
}

TEST_P(TinyMoe, Outputs) {
  const std::vector<float> x = recorded("x");
  const std::vector<float> weights = recorded("weights");
  const std::vector<int32_t> ids = recorded_ids();
  std::vector<float> w13, w2;
  for (int64_t e = 0; e < kE; ++e) {
    const std::string expert = "experts." + std::to_string(e) + ".";
    append(model_, mlp(expert + "gate_proj"), w13);
    append(model_, mlp(expert + "up_proj"), w13);
    append(model_, mlp(expert + "down_proj"), w2);
  }
  std::vector<float> out(kT * kH);
  ref::MoeLayerWeights layer;
  layer.w13 = {w13.data(), {kE, 2 * kI, kH}};
  layer.w2 = {w2.data(), {kE, kH, kI}};
  MoeLayerArgs args;
  args.x = {x.data(), {kT, kH}};
  args.expert_ids = {ids.data(), {kT, kK}};
  args.weights = {weights.data(), {kT, kK}};
  args.out = {out.data(), {kT, kH}};
  const Status status = ref::moe_layer(layer, args);
  ASSERT_TRUE(status.ok()) << status.message();

  const std::vector<float> expected = recorded("out");
  // The recorder sums in f32. Partial sums reach the size of the largest output, a rounding is up
  // to 2^-24 of that, and the 64 of a GEMM make a random walk of 8; as much again for the GEMM
  // before.
  float largest = 0;
  for (const float v : expected) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < out.size(); ++i) {
    ASSERT_NEAR(out[i], expected[i], 16 * 0x1p-24f * largest) << "token " << i / kH;
  }
}

INSTANTIATE_TEST_SUITE_P(Layers, TinyMoe, testing::Values(0, 1));

}  // namespace
}  // namespace moeops

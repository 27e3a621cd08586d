// SPDX-License-Identifier: Apache-2.0

// What moe_layer's arithmetic costs: each form of it against f32, on a trained model's recorded
// activations and on random ones. The figures are printed, and recorded as test properties.

#include <gtest/gtest.h>
#include <moeops/fused/moe_layer.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "tests/support/draw.h"
#include "tests/support/tiny_moe.h"

namespace moeops {
namespace {

using test::Draw;
using test::TinyMoe;

// A layer in f32: x [T, H], w13 [E, 2I, H], w2 [E, H, I].
struct Layer {
  int64_t T, H, I, E, K;
  std::vector<float> x = {}, w13 = {}, w2 = {}, weights = {};
  std::vector<int32_t> ids = {};
};

struct Agreement {
  double relative_rms;
  double cosine;
};

Agreement compare(const std::vector<float>& got, const std::vector<float>& expected) {
  double dd = 0, ee = 0, gg = 0, ge = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double g = got[i], e = expected[i];
    dd += (g - e) * (g - e);
    ee += e * e;
    gg += g * g;
    ge += g * e;
  }
  return {std::sqrt(dd / ee), ge / std::sqrt(ee * gg)};
}

// out with weights of the dtype, quantised or rounded from f32 as they are packed. x and out are
// bf16 beside bf16 weights.
std::vector<float> run(const Layer& layer, DType dtype) {
  Context ctx;
  PackedWeights w13, w2;
  const auto pack = [&](const std::vector<float>& w, int64_t n, int64_t k, WeightRole role,
                        PackedWeights* packed) {
    const Status status = PackedWeights::pack(ctx, {.dtype = dtype, .role = role},
                                              {w.data(), {layer.E, n, k}}, false, {}, packed);
    EXPECT_TRUE(status.ok()) << status.message();
  };
  pack(layer.w13, 2 * layer.I, layer.H, WeightRole::kGateUp, &w13);
  pack(layer.w2, layer.H, layer.I, WeightRole::kPlain, &w2);

  std::vector<float> out(layer.x.size());
  std::vector<bf16> x_bf16, out_bf16(out.size());
  for (const float v : layer.x) x_bf16.push_back(to_bf16(v));
  MoeLayerArgs args;
  args.x = {layer.x.data(), {layer.T, layer.H}};
  args.out = {out.data(), {layer.T, layer.H}};
  if (dtype == DType::kBf16) {
    args.x = {x_bf16.data(), {layer.T, layer.H}};
    args.out = {out_bf16.data(), {layer.T, layer.H}};
  }
  args.expert_ids = {layer.ids.data(), {layer.T, layer.K}};
  args.weights = {layer.weights.data(), {layer.T, layer.K}};
  const Status status = moe_layer(ctx, {.w13 = &w13, .w2 = &w2}, args);
  EXPECT_TRUE(status.ok()) << status.message();
  if (dtype == DType::kBf16) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = to_f32(out_bf16[i]);
  }
  return out;
}

std::vector<float> reference(const Layer& layer) {
  std::vector<float> out(layer.x.size());
  ref::MoeLayerWeights weights;
  weights.w13 = {layer.w13.data(), {layer.E, 2 * layer.I, layer.H}};
  weights.w2 = {layer.w2.data(), {layer.E, layer.H, layer.I}};
  MoeLayerArgs args;
  args.x = {layer.x.data(), {layer.T, layer.H}};
  args.expert_ids = {layer.ids.data(), {layer.T, layer.K}};
  args.weights = {layer.weights.data(), {layer.T, layer.K}};
  args.out = {out.data(), {layer.T, layer.H}};
  const Status status = ref::moe_layer(weights, args);
  EXPECT_TRUE(status.ok()) << status.message();
  return out;
}

void report(const std::string& what, DType dtype, const Agreement& agreement) {
  char text[64];
  std::snprintf(text, sizeof(text), "relative rms %.3g, cosine %.9g", agreement.relative_rms,
                agreement.cosine);
  const std::string name = what + ", " + (dtype == DType::kS8 ? "w8a8" : to_string(dtype));
  std::printf("  %s: %s\n", name.c_str(), text);
  testing::Test::RecordProperty(name, text);
}

// Rounding to bf16 leaves 2^-7 / sqrt(12) of a value's binade, some 0.16% of relative RMS. It meets
// x and w13 in both factors of h, then h, w2 and out: seven times, 0.42% together.
constexpr double kBf16Rms = 0.0042;

// s8 steps of max / 127 leave 1 / sqrt(12) of a step. A row of a hundred normal values has its max
// at some 2.6 deviations, which is 0.6% of relative RMS, once each for x, w13 (both twice in h) and
// w2; h, a product, has longer tails, up to 8 deviations or 1.8%. Together 2.3%.
constexpr double kW8a8Rms = 0.023;

class Accuracy : public testing::Test {
 protected:
  void expect(const std::string& what, const Layer& layer, const std::vector<float>& expected,
              double w8a8_rms) {
    const Agreement bf16 = compare(run(layer, DType::kBf16), expected);
    const Agreement w8a8 = compare(run(layer, DType::kS8), expected);
    report(what, DType::kF32, compare(run(layer, DType::kF32), expected));
    report(what, DType::kBf16, bf16);
    report(what, DType::kS8, w8a8);
    EXPECT_LT(bf16.relative_rms, 2 * kBf16Rms);
    EXPECT_LT(w8a8.relative_rms, 2 * w8a8_rms);
    // Noise that is independent of the signal turns it by half its square.
    EXPECT_GT(w8a8.cosine, 1 - 4 * w8a8_rms * w8a8_rms);
  }
};

Layer random_layer(bool outliers) {
  Layer layer = {.T = 64, .H = 400, .I = 96, .E = 8, .K = 2};
  Draw draw(3);
  const auto normal = [&](int64_t count, float deviation) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = deviation * draw.normal();
    return values;
  };
  layer.x = normal(layer.T * layer.H, 1.0f);
  layer.w13 = normal(layer.E * 2 * layer.I * layer.H, 0.05f);
  layer.w2 = normal(layer.E * layer.H * layer.I, 0.1f);
  for (int64_t i = 0; i < layer.T * layer.K; ++i) {
    layer.ids.push_back(static_cast<int32_t>(draw.between(0, layer.E - 1)));
    layer.weights.push_back(draw.uniform(0.1f, 1.0f));
  }
  if (outliers) {
    // 0.5% of the channels are 50 times as large.
    for (int64_t channel = 100; channel < layer.H; channel += 200) {
      for (int64_t t = 0; t < layer.T; ++t) {
        layer.x[static_cast<size_t>(t * layer.H + channel)] *= 50.0f;
      }
    }
  }
  return layer;
}

TEST_F(Accuracy, OfNormalActivations) {
  const Layer layer = random_layer(false);
  expect("normal", layer, reference(layer), kW8a8Rms);
}

// A step is then that of the outliers: max / 127 is 60 / 127 where the row's RMS is 3.7, a relative
// RMS of 3.7% for x, twice in h.
TEST_F(Accuracy, OfActivationsWithOutlierChannels) {
  const Layer layer = random_layer(true);
  expect("outliers", layer, reference(layer), kW8a8Rms + 0.037 * 1.42);
}

class AccuracyOnTinyMoe : public Accuracy, public testing::WithParamInterface<int> {};

TEST_P(AccuracyOnTinyMoe, OfRecordedActivations) {
  const TinyMoe recorded(GetParam());
  const Layer layer = {.T = TinyMoe::kT,
                       .H = TinyMoe::kH,
                       .I = TinyMoe::kI,
                       .E = TinyMoe::kE,
                       .K = TinyMoe::kK,
                       .x = recorded.x,
                       .w13 = recorded.w13,
                       .w2 = recorded.w2,
                       .weights = recorded.weights,
                       .ids = recorded.ids};
  // Both sides sum in f32: partial sums reach the size of the largest output, a rounding is up to
  // 2^-24 of that, and the 64 of a GEMM make a random walk of 8; as much again for the GEMM before,
  // and for the other side.
  float largest = 0;
  for (const float v : recorded.out) largest = std::max(largest, std::fabs(v));
  const std::vector<float> out = run(layer, DType::kF32);
  for (size_t i = 0; i < out.size(); ++i) {
    ASSERT_NEAR(out[i], recorded.out[i], 32 * 0x1p-24f * largest) << "token " << i / TinyMoe::kH;
  }
  expect("tinymoe layer " + std::to_string(GetParam()), layer, recorded.out, kW8a8Rms);
}

INSTANTIATE_TEST_SUITE_P(Layers, AccuracyOnTinyMoe, testing::Values(0, 1));

}  // namespace
}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::expect_refused;

const float kNan = std::numeric_limits<float>::quiet_NaN();

// The stages as members of their own, as the sweep wants them.
struct Args : MoeLayerArgs, ref::MoeLayerWeights, MoeLayerStages {};

Status call(const Args& args) {
  MoeLayerArgs layer = args;
  layer.stages = args;
  return ref::moe_layer(args, layer);
}

// With alpha 0 swiglu is g / 2 * (u + 1), exact.
const SwigluParams kExactSwiglu = {GatedActivation::kSwigluOai, Gate::kLeft, 1e30f, 0.0f};

// One token x = 2, H = 1, I = 1, K = 2, two experts:
//   expert 0: g = 2, u = 3, h = 4, y = 4 / 2 = 2
//   expert 1: g = 4, u = 1, h = 4, y = -12
class MoeLayer : public testing::Test {
 protected:
  MoeLayer() {
    args_.x = {x_, {1, 1}};
    args_.expert_ids = {ids_, {1, 2}};
    args_.weights = {weights_, {1, 2}};
    args_.w13 = {w13_, {2, 2, 1}};
    args_.w2 = {w2_, {2, 1, 1}};
    args_.swiglu = kExactSwiglu;
    args_.out = {&out_, {1, 1}};
  }
  void one_expert() {
    args_.expert_ids = {ids_, {1, 1}};
    args_.weights = {weights_, {1, 1}};
  }
  // Is = 2: g = {x, x}, u = {0, x}; for x = 2, h = {1, 3} and y = 4, for expert 1 40.
  void with_shared(int64_t S) {
    args_.shared_w13 = {shared_w13_, {S, 4, 1}};
    args_.shared_w2 = {shared_w2_, {S, 1, 2}};
  }
  float run() {
    out_ = 55;
    const Status status = call(args_);
    EXPECT_TRUE(status.ok()) << status.message();
    return out_;
  }

  float x_[1] = {2};
  int32_t ids_[2] = {0, 1};
  float weights_[2] = {0.5f, 0.25f};
  float w13_[4] = {1, 1.5f, 2, 0.5f};
  float w2_[2] = {0.5f, -3};
  const float shared_w13_[8] = {1, 1, 0, 1, 1, 1, 0, 1};
  const float shared_w2_[4] = {1, 1, 10, 10};
  float out_ = 0;
  Args args_;
};

TEST_F(MoeLayer, WeightedSumOfExperts) {
  EXPECT_EQ(run(), 0.5f * 2 + 0.25f * -12);
  ids_[0] = ids_[1] = 1;  // an id may repeat
  EXPECT_EQ(run(), 0.75f * -12);
}

TEST_F(MoeLayer, Biases) {
  const float b13[4] = {2, 0, -4, 0};  // g = {4, 0}, h = {8, 0}
  const float b2[2] = {1, 8};          // y = {5, 8}
  args_.b13 = {b13, {2, 2}};
  args_.b2 = {b2, {2, 1}};
  EXPECT_EQ(run(), 0.5f * 5 + 0.25f * 8);
}

TEST_F(MoeLayer, GateLayout) {
  args_.swiglu.gate = Gate::kRight;
  // expert 0: g = 3, u = 2, h = 4.5; expert 1: g = 1, u = 4, h = 2.5
  EXPECT_EQ(run(), 0.5f * 2.25f + 0.25f * -7.5f);
}

TEST_F(MoeLayer, SharedExpertsOfAnotherWidth) {
  with_shared(1);
  EXPECT_EQ(run(), -2.0f + 4);
  with_shared(2);
  EXPECT_EQ(run(), -2.0f + 4 + 40);
}

TEST_F(MoeLayer, SharedExpertsAloneWithoutChoices) {
  args_.expert_ids = {ids_, {1, 0}};
  args_.weights = {weights_, {1, 0}};
  EXPECT_EQ(run(), 0.0f);
  with_shared(1);
  EXPECT_EQ(run(), 4.0f);
}

TEST_F(MoeLayer, WeightOnInput) {
  one_expert();
  with_shared(1);
  args_.weight_on_input = true;
  // The routed expert sees 1: g = 1, u = 1.5, h = 1.25, y = 0.625; the shared one sees 2.
  EXPECT_EQ(run(), 0.625f + 4);
}

TEST_F(MoeLayer, MaskedSlotsContributeNothing) {
  args_.allow_masked = true;
  for (const int32_t mask : {-1, 2}) {
    ids_[0] = mask;
    weights_[0] = kNan;
    EXPECT_EQ(run(), 0.25f * -12);
  }
  ids_[1] = -1;
  EXPECT_EQ(run(), 0.0f);
  with_shared(1);
  EXPECT_EQ(run(), 4.0f);
  one_expert();
  args_.weight_on_input = true;
  EXPECT_EQ(run(), 4.0f);
}

TEST_F(MoeLayer, AWeightOfZeroMultiplies) {
  w2_[0] = kNan;
  weights_[0] = 0;
  EXPECT_TRUE(std::isnan(run()));
}

TEST_F(MoeLayer, SumsWithOneRounding) {
  // After slot 0 acc is -1 - 2^-11. Slot 1 adds (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24, whose last bit
  // only an fma keeps.
  const float tick = 1 + 0x1p-12f;
  const int32_t ids[2] = {1, 0};
  const float weights[2] = {-1 - 0x1p-11f, tick};
  const float w13[4] = {1, 0, 1, 0};  // h = x / 2
  const float w2[2] = {tick, 1};
  args_.expert_ids = {ids, {1, 2}};
  args_.weights = {weights, {1, 2}};
  args_.w13 = {w13, {2, 2, 1}};
  args_.w2 = {w2, {2, 1, 1}};
  EXPECT_EQ(run(), 0x1p-24f);
}

TEST_F(MoeLayer, Stages) {
  float h[2], y[2], shared = 55;
  with_shared(2);
  args_.h = {h, {2, 1}};
  args_.y = {y, {2, 1}};
  args_.shared = {&shared, {1, 1}};
  run();
  EXPECT_EQ(h[0], 4.0f);
  EXPECT_EQ(h[1], 4.0f);
  EXPECT_EQ(y[0], 2.0f);
  EXPECT_EQ(y[1], -12.0f);
  EXPECT_EQ(shared, 44.0f);
  args_.allow_masked = true;
  ids_[0] = -1;
  run();
  EXPECT_EQ(h[0], 0.0f);
  EXPECT_EQ(y[0], 0.0f);
  EXPECT_EQ(y[1], -12.0f);
}

// g = 1 + 2^-7, u = 2^-7: h = (1 + 2^-6 + 2^-14) / 2, of which bf16 keeps (1 + 2^-6) / 2.
TEST_F(MoeLayer, Bf16RoundsTheInputOfEachGemm) {
  one_expert();
  const bf16 x = {0x3F80}, w13[2] = {{0x3F81}, {0x3C00}}, w2 = {0x3F80};
  bf16 out = {0};
  float h = 0, y = 0;
  args_.x = {&x, {1, 1}};
  args_.w13 = {w13, {1, 2, 1}};
  args_.w2 = {&w2, {1, 1, 1}};
  args_.out = {&out, {1, 1}};
  args_.h = {&h, {1, 1}};
  args_.y = {&y, {1, 1}};
  weights_[0] = 1 + 0x1p-9f;
  for (const bool weight_on_input : {false, true}) {  // x * weight rounds to 1 as well
    args_.weight_on_input = weight_on_input;
    ASSERT_TRUE(call(args_).ok());
    EXPECT_EQ(h, (1 + 0x1p-6f + 0x1p-14f) / 2);
    EXPECT_EQ(y, (1 + 0x1p-6f) / 2);
    EXPECT_EQ(out.bits, 0x3F02);
  }
}

// One token x = {127, -63.5}, quantised to {127, -64}; g = x0, u = x1: h = 127 / 2 * -63 = -4000.5;
// w2 makes y = {h, 2 h}.
class MoeLayerS8 : public testing::Test {
 protected:
  MoeLayerS8() {
    args_.x = {x_, {1, 2}};
    args_.expert_ids = {&id_, {1, 1}};
    args_.weights = {&weight_, {1, 1}};
    args_.w13 = {w13_, {1, 2, 2}};
    args_.w13_scale = {ones_, {1, 2}};
    args_.w2 = {w2_, {1, 2, 1}};
    args_.w2_scale = {ones_, {1, 2}};
    args_.swiglu = kExactSwiglu;
    args_.x_q = {x_q_.data(), {1, 2}};
    args_.x_scale = {&x_scale_, {1}};
    args_.h = {&h_, {1, 1}};
    args_.h_q = {&h_q_, {1, 1}};
    args_.h_scale = {&h_scale_, {1}};
    args_.y = {y_, {1, 2}};
    args_.out = {out_, {1, 2}};
  }

  float x_[2] = {127, -63.5f};
  int32_t id_ = 0;
  float weight_ = 2;
  const int8_t w13_[4] = {1, 0, 0, 1};
  const int8_t w2_[2] = {1, 2};
  float ones_[2] = {1, 1};
  std::vector<int8_t> x_q_ = {55, 55};
  float x_scale_ = 55, h_ = 55;
  int8_t h_q_ = 55;
  float h_scale_ = 55, y_[2] = {55, 55}, out_[2] = {55, 55};
  Args args_;
};

TEST_F(MoeLayerS8, QuantisesXPerTokenAndHPerSlot) {
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(x_q_, (std::vector<int8_t>{127, -64}));
  EXPECT_EQ(x_scale_, 1.0f);
  EXPECT_EQ(h_, -4000.5f);
  EXPECT_EQ(h_q_, -127);
  EXPECT_EQ(h_scale_, 4000.5f / 127);
  EXPECT_EQ(y_[0], -127 * (4000.5f / 127));
  EXPECT_EQ(y_[1], -254 * (4000.5f / 127));
  EXPECT_EQ(out_[0], 2 * y_[0]);
  EXPECT_EQ(out_[1], 2 * y_[1]);
}

TEST_F(MoeLayerS8, WeightOnInputIsQuantisedAfterIt) {
  args_.weight_on_input = true;
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(x_q_, (std::vector<int8_t>{127, -64}));
  EXPECT_EQ(x_scale_, 2.0f);
  EXPECT_EQ(h_, 127 * -127);  // g = 254, u = -128
  EXPECT_EQ(out_[0], y_[0]);
  EXPECT_EQ(out_[1], y_[1]);
}

TEST_F(MoeLayerS8, AMaskedTokensWeightIsNotRead) {
  id_ = -1;
  weight_ = kNan;
  args_.allow_masked = true;
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(x_q_, (std::vector<int8_t>{127, -64}));
  EXPECT_EQ(x_scale_, 1.0f);
  EXPECT_EQ(h_q_, 0);
  EXPECT_EQ(h_scale_, 0.0f);
  EXPECT_EQ(out_[0], 0.0f);
  args_.weight_on_input = true;
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(x_q_, (std::vector<int8_t>{0, 0}));
  EXPECT_EQ(x_scale_, 0.0f);
}

TEST_F(MoeLayerS8, TakesEveryX) {
  const bf16 x_bf16[2] = {{0x42FE}, {0xC27E}};
  const f16 x_f16[2] = {{0x57F0}, {0xD3F0}};
  bf16 out_bf16[2];
  f16 out_f16[2];
  weight_ = 0x1p-4f;  // out = {-250.03, -500.06}
  args_.x = {x_bf16, {1, 2}};
  args_.out = {out_bf16, {1, 2}};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(out_bf16[0].bits, 0xC37A);  // -250
  EXPECT_EQ(out_bf16[1].bits, 0xC3FA);  // -500
  args_.x = {x_f16, {1, 2}};
  args_.out = {out_f16, {1, 2}};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(out_f16[0].bits, 0xDBD0);  // -250
  EXPECT_EQ(out_f16[1].bits, 0xDFD0);  // -500
}

// A random layer: T = 5 tokens, H = 6, I = 4, E = 3, K = 2, one shared expert of Is = 3.
struct RandomLayer {
  explicit RandomLayer(uint64_t seed, bool s8) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> byte(-127, 127), expert(0, 2);
    for (auto* floats : {&x, &weights, &b13, &b2, &w13, &w2, &shared_w13, &shared_w2}) {
      for (float& v : *floats) v = normal(random);
    }
    for (auto* bytes : {&w13_s8, &w2_s8, &shared_w13_s8, &shared_w2_s8}) {
      for (int8_t& v : *bytes) v = static_cast<int8_t>(byte(random));
    }
    for (float& v : scales) v = 0.01f + 0.001f * std::fabs(normal(random));
    for (int32_t& id : ids) id = expert(random);

    args.x = {x.data(), {5, 6}};
    args.expert_ids = {ids.data(), {5, 2}};
    args.weights = {weights.data(), {5, 2}};
    args.b13 = {b13.data(), {3, 8}};
    args.b2 = {b2.data(), {3, 6}};
    args.out = {out.data(), {5, 6}};
    args.h = {h.data(), {10, 4}};
    args.y = {y.data(), {10, 6}};
    args.shared = {shared.data(), {5, 6}};
    if (s8) {
      args.w13 = {w13_s8.data(), {3, 8, 6}};
      args.w2 = {w2_s8.data(), {3, 6, 4}};
      args.shared_w13 = {shared_w13_s8.data(), {1, 6, 6}};
      args.shared_w2 = {shared_w2_s8.data(), {1, 6, 3}};
      args.w13_scale = {scales.data(), {3, 8}};
      args.w2_scale = {scales.data(), {3, 6}};
      args.shared_w13_scale = {scales.data(), {1, 6}};
      args.shared_w2_scale = {scales.data(), {1, 6}};
      args.x_q = {x_q.data(), {5, 6}};
      args.x_scale = {x_scale.data(), {5}};
      args.h_q = {h_q.data(), {10, 4}};
      args.h_scale = {h_scale.data(), {10}};
    } else {
      args.w13 = {w13.data(), {3, 8, 6}};
      args.w2 = {w2.data(), {3, 6, 4}};
      args.shared_w13 = {shared_w13.data(), {1, 6, 6}};
      args.shared_w2 = {shared_w2.data(), {1, 6, 3}};
    }
  }
  RandomLayer(const RandomLayer&) = delete;

  using Floats = std::vector<float>;
  using Bytes = std::vector<int8_t>;
  Floats x = Floats(30), weights = Floats(10), b13 = Floats(24), b2 = Floats(18);
  Floats w13 = Floats(144), w2 = Floats(72), shared_w13 = Floats(36), shared_w2 = Floats(18);
  Bytes w13_s8 = Bytes(144), w2_s8 = Bytes(72), shared_w13_s8 = Bytes(36), shared_w2_s8 = Bytes(18);
  Floats scales = Floats(24);
  std::vector<int32_t> ids = std::vector<int32_t>(10);
  Floats out = Floats(30), h = Floats(40), y = Floats(60), shared = Floats(30);
  Bytes x_q = Bytes(30), h_q = Bytes(40);
  Floats x_scale = Floats(5), h_scale = Floats(10);
  Args args;
};

// The layer is the chain of its operators: with the slots in expert order, two grouped GEMMs.
TEST(MoeLayerChain, EqualsSingleOperators) {
  for (uint64_t round = 0; round < 20; ++round) {
    const uint64_t seed = test::seed_of(round);
    RandomLayer layer(seed, /*s8=*/true);
    ASSERT_TRUE(call(layer.args).ok());

    std::vector<size_t> slots;  // in the order of the experts
    std::vector<int64_t> counts(3);
    for (int32_t e = 0; e < 3; ++e) {
      for (size_t slot = 0; slot < 10; ++slot) {
        if (layer.ids[slot] == e) slots.push_back(slot);
      }
      counts[static_cast<size_t>(e)] = static_cast<int64_t>(slots.size());
    }
    std::vector<int8_t> x_q(60), h_q(40);
    std::vector<float> x_scale(10), h_scale(10), y(60);
    for (size_t i = 0; i < 10; ++i) {
      DynamicQuantArgs quant;
      quant.x = {layer.x.data() + slots[i] / 2 * 6, {1, 6}};
      quant.q = {x_q.data() + i * 6, {1, 6}};
      quant.scale = {&x_scale[i], {1}};
      ASSERT_TRUE(ref::dynamic_quant(quant).ok());
    }
    GroupedMatmulSwigluQuantArgs first;
    first.x = {x_q.data(), {10, 6}};
    first.x_scale = {x_scale.data(), {10}};
    first.group_list = {counts.data(), {3}};
    first.list_type = ListType::kCumsum;
    first.bias = layer.args.b13;
    first.q = {h_q.data(), {10, 4}};
    first.scale = {h_scale.data(), {10}};
    ASSERT_TRUE(
        ref::grouped_matmul_swiglu_quant({layer.args.w13, false, layer.args.w13_scale}, first)
            .ok());
    GroupedMatmulArgs second;
    second.x = first.q;
    second.x_scale = first.scale;
    second.group_list = first.group_list;
    second.list_type = ListType::kCumsum;
    second.bias = layer.args.b2;
    second.y = {y.data(), {10, 6}};
    ASSERT_TRUE(ref::grouped_matmul({layer.args.w2, false, layer.args.w2_scale}, second).ok());

    for (size_t i = 0; i < 10; ++i) {
      const size_t slot = slots[i];
      EXPECT_EQ(layer.h_scale[slot], h_scale[i]) << test::replay_hint(seed);
      for (size_t j = 0; j < 4; ++j) {
        EXPECT_EQ(layer.h_q[slot * 4 + j], h_q[i * 4 + j]) << test::replay_hint(seed);
      }
      for (size_t j = 0; j < 6; ++j) {
        EXPECT_EQ(layer.y[slot * 6 + j], y[i * 6 + j]) << test::replay_hint(seed);
      }
    }
    for (size_t t = 0; t < 5; ++t) {
      for (size_t j = 0; j < 6; ++j) {
        const float* y0 = layer.y.data() + 2 * t * 6;
        const float acc = std::fma(layer.weights[2 * t + 1], y0[6 + j],
                                   std::fma(layer.weights[2 * t], y0[j], 0.0f));
        EXPECT_EQ(layer.out[t * 6 + j], acc + layer.shared[t * 6 + j]) << test::replay_hint(seed);
      }
    }
  }
}

TEST(MoeLayerRandom, ANonFiniteTokenStaysAlone) {
  for (const bool s8 : {false, true}) {
    RandomLayer clean(7, s8), layer(7, s8);
    layer.x[1 * 6 + 2] = kNan;
    layer.weights[3 * 2] = std::numeric_limits<float>::infinity();
    ASSERT_TRUE(call(clean.args).ok());
    ASSERT_TRUE(call(layer.args).ok());
    for (size_t t = 0; t < 5; ++t) {
      for (size_t j = 0; j < 6; ++j) {
        if (t == 1 || t == 3) {
          EXPECT_FALSE(std::isfinite(layer.out[t * 6 + j])) << t << ", " << j;
        } else {
          EXPECT_EQ(layer.out[t * 6 + j], clean.out[t * 6 + j]) << t << ", " << j;
        }
      }
    }
  }
}

TEST(MoeLayerRandom, RowsMayBeStrided) {
  RandomLayer dense(8, false), strided(8, false);
  const auto spread = [](const std::vector<float>& v, size_t columns) {
    std::vector<float> wide(v.size() / columns * (columns + 3), kNan);
    for (size_t i = 0; i < v.size(); ++i) wide[i / columns * (columns + 3) + i % columns] = v[i];
    return wide;
  };
  const std::vector<float> x = spread(dense.x, 6), w13 = spread(dense.w13, 6);
  const std::vector<float> w2 = spread(dense.w2, 4), b13 = spread(dense.b13, 8);
  std::vector<float> out(5 * 7, 55.0f);
  strided.args.x = {x.data(), {5, 6}, 9};
  strided.args.w13 = {w13.data(), {3, 8, 6}, 9};
  strided.args.w2 = {w2.data(), {3, 6, 4}, 7};
  strided.args.b13 = {b13.data(), {3, 8}, 11};
  strided.args.out = {out.data(), {5, 6}, 7};
  ASSERT_TRUE(call(dense.args).ok());
  ASSERT_TRUE(call(strided.args).ok());
  for (size_t t = 0; t < 5; ++t) {
    for (size_t j = 0; j < 6; ++j) EXPECT_EQ(out[t * 7 + j], dense.out[t * 6 + j]);
    EXPECT_EQ(out[t * 7 + 6], 55.0f);
  }
}

TEST(MoeLayerErrors, EveryViewIsChecked) {
  const std::vector<test::InputView<Args>> inputs = {{"x", &Args::MoeLayerArgs::x},
                                                     {"expert_ids", &Args::expert_ids},
                                                     {"weights", &Args::weights},
                                                     {"b13", &Args::b13, false},
                                                     {"b2", &Args::b2, false},
                                                     {"w13", &Args::w13},
                                                     {"w2", &Args::w2},
                                                     {"shared_w13", &Args::shared_w13},
                                                     {"shared_w2", &Args::shared_w2}};
  const std::vector<test::OutputView<Args>> outputs = {{"out", &Args::out},
                                                       {"stage.h", &Args::h, false},
                                                       {"stage.y", &Args::y, false},
                                                       {"stage.shared", &Args::shared, false}};
  RandomLayer f32(9, false);
  test::sweep_contract<Args>(f32.args, inputs, outputs, call);

  RandomLayer s8(9, true);
  std::vector<test::InputView<Args>> s8_inputs = inputs;
  for (const auto& scale : {test::InputView<Args>{"w13_scale", &Args::w13_scale},
                            {"w2_scale", &Args::w2_scale},
                            {"shared_w13_scale", &Args::shared_w13_scale},
                            {"shared_w2_scale", &Args::shared_w2_scale}}) {
    s8_inputs.push_back(scale);
  }
  std::vector<test::OutputView<Args>> s8_outputs = outputs;
  for (const auto& stage : {test::OutputView<Args>{"stage.x_q", &Args::x_q, false},
                            {"stage.x_scale", &Args::x_scale, false},
                            {"stage.h_q", &Args::h_q, false},
                            {"stage.h_scale", &Args::h_scale, false}}) {
    s8_outputs.push_back(stage);
  }
  test::sweep_contract<Args>(s8.args, s8_inputs, s8_outputs, call);
}

TEST(MoeLayerErrors, ExpertIds) {
  RandomLayer layer(10, false);
  layer.ids[7] = 3;
  expect_refused(call(layer.args), "moe_layer: expert_ids[3,1] = 3 is not in [0, 3)");
  layer.ids[7] = -1;
  expect_refused(call(layer.args), "moe_layer: expert_ids[3,1] = -1 is not in [0, 3)");
  layer.args.allow_masked = true;
  EXPECT_TRUE(call(layer.args).ok());
  for (const int32_t id : {4, -2}) {
    layer.ids[7] = id;
    layer.out.assign(30, 55.0f);
    expect_refused(call(layer.args), "moe_layer: expert_ids[3,1] = " + std::to_string(id) +
                                         " is not in [0, 3), nor does it mask");
    EXPECT_EQ(layer.out, std::vector<float>(30, 55.0f));
  }
}

TEST(MoeLayerErrors, WeightOnInputIsForOneChoice) {
  RandomLayer layer(11, false);
  layer.args.weight_on_input = true;
  expect_refused(call(layer.args),
                 "moe_layer: weight_on_input is for K = 1, but K = 2 (from expert_ids)");
}

TEST(MoeLayerErrors, DtypesThatDoNotGoTogether) {
  RandomLayer f32(12, false), s8(12, true);
  std::vector<bf16> halves(144);
  Args args = f32.args;
  args.x = {halves.data(), {5, 6}};
  expect_refused(call(args), "moe_layer: x is bf16, but w13 is f32");
  args = f32.args;
  args.w2 = {halves.data(), {3, 6, 4}};
  expect_refused(call(args), "moe_layer: w2 is bf16, but w13 is f32");
  args = f32.args;
  args.shared_w13 = s8.args.shared_w13;
  expect_refused(call(args), "moe_layer: shared_w13 is s8, but w13 is f32");
  args = s8.args;
  args.shared_w2 = f32.args.shared_w2;
  expect_refused(call(args), "moe_layer: shared_w2 is f32, but w13 is s8");
  args = f32.args;
  args.out = {halves.data(), {5, 6}};
  expect_refused(call(args), "moe_layer: out has dtype bf16, which is not legal here");
}

TEST(MoeLayerErrors, ViewsWithoutAUse) {
  RandomLayer f32(13, false), s8(13, true);
  for (const auto scale :
       {&Args::w13_scale, &Args::w2_scale, &Args::shared_w13_scale, &Args::shared_w2_scale}) {
    Args args = f32.args;
    args.*scale = s8.args.*scale;
    EXPECT_EQ(call(args).code(), StatusCode::kInvalidArgument);
  }
  for (const auto stage : {&Args::x_q, &Args::x_scale, &Args::h_q, &Args::h_scale}) {
    Args args = f32.args;
    args.*stage = s8.args.*stage;
    EXPECT_EQ(call(args).code(), StatusCode::kInvalidArgument);
  }
  Args args = s8.args;
  args.shared_w13 = args.shared_w2 = args.shared_w13_scale = args.shared_w2_scale = {};
  expect_refused(call(args), "moe_layer: stage.shared is given, but shared_w13 is missing");
  args.shared = {};
  EXPECT_TRUE(call(args).ok());
  args.shared_w2_scale = s8.args.shared_w2_scale;
  expect_refused(call(args), "moe_layer: shared_w2_scale is given, but shared_w2 is missing");
  args.shared_w13_scale = s8.args.shared_w13_scale;
  expect_refused(call(args), "moe_layer: shared_w13_scale is given, but shared_w13 is missing");
}

TEST(MoeLayerErrors, SizesOfTheWeights) {
  RandomLayer f32(14, false), s8(14, true);
  Args args = f32.args;
  args.w13 = {f32.w13.data(), {3, 7, 6}};
  expect_refused(call(args), "moe_layer: 2I = 7 (from w13) is odd, but holds gate and up");
  args = f32.args;
  args.shared_w13 = {f32.shared_w13.data(), {1, 5, 6}};
  expect_refused(call(args), "moe_layer: 2Is = 5 (from shared_w13) is odd, but holds gate and up");
  args = f32.args;
  args.swiglu = kExactSwiglu;
  args.swiglu.limit = -1;
  expect_refused(call(args), "moe_layer: limit = -1 is not a number from 0 on");

  // Nothing to compute, but the sizes stay illegal.
  Args empty;
  empty.x = {s8.x.data(), {0, 65537}};
  empty.expert_ids = {s8.ids.data(), {0, 2}};
  empty.weights = {s8.weights.data(), {0, 2}};
  empty.out = {s8.out.data(), {0, 65537}};
  empty.w13 = {s8.w13_s8.data(), {0, 8, 65537}};
  empty.w13_scale = {s8.scales.data(), {0, 8}};
  empty.w2 = {s8.w2_s8.data(), {0, 65537, 4}};
  empty.w2_scale = {s8.scales.data(), {0, 65537}};
  expect_refused(call(empty),
                 "moe_layer: H = 65537 (w13) is more than 65536, beyond which s32 overflows");
  empty.x = {s8.x.data(), {0, 6}};
  empty.out = {s8.out.data(), {0, 6}};
  empty.w13 = {s8.w13_s8.data(), {0, 2 * 65537, 6}};
  empty.w13_scale = {s8.scales.data(), {0, 2 * 65537}};
  empty.w2 = {s8.w2_s8.data(), {0, 6, 65537}};
  empty.w2_scale = {s8.scales.data(), {0, 6}};
  expect_refused(call(empty),
                 "moe_layer: I = 65537 (w2) is more than 65536, beyond which s32 overflows");
}

TEST(MoeLayerZeroSizes, NoTokensNoExpertsNoWidth) {
  RandomLayer layer(15, false);
  Args args = layer.args;
  args.h = args.y = args.shared = {};
  layer.out.assign(30, 55.0f);
  args.x = {layer.x.data(), {0, 6}};
  args.expert_ids = {layer.ids.data(), {0, 2}};
  args.weights = {layer.weights.data(), {0, 2}};
  args.out = {layer.out.data(), {0, 6}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(layer.out, std::vector<float>(30, 55.0f));

  // Without an intermediate an expert is its last bias.
  args = layer.args;
  args.h = args.y = args.shared = {};
  args.shared_w13 = args.shared_w2 = {};
  args.w13 = {layer.w13.data(), {3, 0, 6}};
  args.b13 = {layer.b13.data(), {3, 0}};
  args.w2 = {layer.w2.data(), {3, 6, 0}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(layer.out[0],
            std::fma(layer.weights[1], layer.b2[static_cast<size_t>(layer.ids[1]) * 6],
                     layer.weights[0] * layer.b2[static_cast<size_t>(layer.ids[0]) * 6]));

  // Without experts every slot is masked.
  args.w13 = {layer.w13.data(), {0, 8, 6}};
  args.b13 = {layer.b13.data(), {0, 8}};
  args.w2 = {layer.w2.data(), {0, 6, 4}};
  args.b2 = {layer.b2.data(), {0, 6}};
  args.allow_masked = true;
  layer.ids.assign(10, -1);
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(layer.out, std::vector<float>(30, 0.0f));
}

}  // namespace
}  // namespace moeops

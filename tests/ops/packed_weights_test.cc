// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/packed_weights.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ref/numeric.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::expect_refused;
using test::GuardedBuffer;

std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (int i = 0; i <= static_cast<int>(machine().isa); ++i) all.push_back(static_cast<Isa>(i));
  return all;
}

struct Draw {
  explicit Draw(uint64_t seed) : random(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return *(choices.begin() + between(0, static_cast<int64_t>(choices.size()) - 1));
  }
  template <class T>
  T of(const std::vector<T>& choices) {
    return choices[static_cast<size_t>(between(0, static_cast<int64_t>(choices.size()) - 1))];
  }
  std::mt19937_64 random;
};

// Plain weights [E, N, K] or [E, K, N] between guard pages, and their scales if they are s8.
struct Plain {
  DType dtype;
  int64_t E, N, K;
  bool transposed;
  int64_t row_stride;
  GuardedBuffer memory;
  std::vector<float> scales;  // [E, N], s8 only

  Plain(Draw& draw, DType type, int64_t e, int64_t n, int64_t k)
      : dtype(type),
        E(e),
        N(n),
        K(k),
        transposed(draw.of({false, true})),
        row_stride((transposed ? N : K) + draw.of<int64_t>({0, 0, 1, 7})),
        memory(span(), draw.of({GuardedBuffer::Against::kFront, GuardedBuffer::Against::kBack})) {
    std::normal_distribution<float> normal;
    if (dtype == DType::kF32) {
      for (size_t i = 0; i < memory.bytes() / 4; ++i) memory.as<float>()[i] = normal(draw.random);
    } else if (dtype == DType::kS8) {
      for (size_t i = 0; i < memory.bytes(); ++i) {
        memory.as<int8_t>()[i] = static_cast<int8_t>(draw.random());
      }
      for (int64_t i = 0; i < E * N; ++i) scales.push_back(normal(draw.random));
    } else {
      for (size_t i = 0; i < memory.bytes() / 2; ++i) {
        const float x = normal(draw.random);
        memory.as<uint16_t>()[i] = dtype == DType::kBf16 ? to_bf16(x).bits : to_f16(x).bits;
      }
    }
  }
  size_t span() const {
    const int64_t rows = E * (transposed ? K : N);
    const int64_t columns = transposed ? N : K;
    return rows == 0 || columns == 0
               ? 0
               : static_cast<size_t>(((rows - 1) * row_stride + columns) * size_of(dtype));
  }
  char* at(int64_t e, int64_t n, int64_t k) const {
    const int64_t row = transposed ? e * K + k : e * N + n;
    return memory.as<char>() + (row * row_stride + (transposed ? n : k)) * size_of(dtype);
  }
  // By the reference's conversions.
  float f32(int64_t e, int64_t n, int64_t k) const {
    const ConstTensorView one(at(e, n, k), TensorLayout(dtype, {1, 1}));
    return ref::FloatRow(one, 0)[0];
  }
  ConstTensorView all() const {
    return {memory.as<char>(), transposed ? TensorLayout(dtype, {E, K, N}, row_stride)
                                          : TensorLayout(dtype, {E, N, K}, row_stride)};
  }
  ConstTensorView expert(int64_t e) const {
    return {at(e, 0, 0), transposed ? TensorLayout(dtype, {K, N}, row_stride)
                                    : TensorLayout(dtype, {N, K}, row_stride)};
  }
  ConstTensorView all_scales() const {
    return dtype == DType::kS8 ? ConstTensorView(scales.data(), {E, N}) : ConstTensorView();
  }
  ConstTensorView expert_scales(int64_t e) const {
    return dtype == DType::kS8 ? ConstTensorView(scales.data() + e * N, {N}) : ConstTensorView();
  }
};

// What the layout says, column by column: the channel there, or -1.
std::vector<int64_t> channels(const PackedWeightsForm& form) {
  std::vector<int64_t> columns;
  if (form.role == WeightRole::kPlain) {
    for (int64_t n = 0; n < form.n; ++n) columns.push_back(n);
    const int64_t rest = form.n % 64;
    const int64_t width = rest == 0 ? 0 : rest <= 32 ? 32 : rest <= 48 ? 48 : 64;
    for (int64_t n = rest; n < width; ++n) columns.push_back(-1);
    return columns;
  }
  const int64_t I = form.n / 2;
  for (int64_t first = 0; first < I; first += 32) {
    const int64_t half = I - first <= 16 ? 16 : 32;
    for (const bool up : {false, true}) {
      for (int64_t i = first; i < first + half; ++i) {
        const bool second = up != (form.gate == Gate::kRight);
        columns.push_back(i >= I                            ? -1
                          : form.gate == Gate::kInterleaved ? 2 * i + (up ? 1 : 0)
                                                            : i + (second ? I : 0));
      }
    }
  }
  return columns;
}

// The channel as the form's dtype has it, by operators.md; f32 and bf16 as bits.
struct Channel {
  std::vector<int64_t> values;
  float scale = 0.0f;
  int32_t sum = 0;
};

Channel channel_of(const Plain& plain, const PackedWeightsForm& form, int64_t e, int64_t n) {
  Channel channel;
  if (form.dtype != DType::kS8) {
    for (int64_t k = 0; k < plain.K; ++k) {
      const float x = plain.f32(e, n, k);
      channel.values.push_back(form.dtype == DType::kF32 ? std::bit_cast<uint32_t>(x)
                                                         : ref::encode_half(x, 7));
    }
    return channel;
  }
  if (plain.dtype == DType::kS8) {
    channel.scale = form.scales ? plain.scales[static_cast<size_t>(e * plain.N + n)] : 0.0f;
    for (int64_t k = 0; k < plain.K; ++k) {
      channel.values.push_back(*reinterpret_cast<const int8_t*>(plain.at(e, n, k)));
    }
  } else {
    float max = 0.0f;
    bool finite = true;
    for (int64_t k = 0; k < plain.K; ++k) {
      finite = finite && std::isfinite(plain.f32(e, n, k));
      max = std::fmax(max, std::fabs(plain.f32(e, n, k)));
    }
    channel.scale = !finite ? NAN : max / 127.0f;
    for (int64_t k = 0; k < plain.K; ++k) {
      const bool zero = !finite || max == 0.0f;
      channel.values.push_back(zero ? 0
                                    : ref::quantise(plain.f32(e, n, k) * (127.0f / max), -127.0f));
    }
  }
  for (const int64_t q : channel.values) channel.sum += static_cast<int32_t>(q);
  return channel;
}

// Every element of the pack: that it is where the layout says, and that all else is zero.
void expect_packed(const PackedWeights& packed, const PackedWeightsForm& form, const Plain& plain) {
  const int64_t element = size_of(form.dtype);
  const int64_t group = 4 / element;
  const int64_t padded_k = (form.k * element + 63) / 64 * 64 / element;
  const std::vector<int64_t> columns = channels(form);
  ASSERT_EQ(packed.k_chunks() * 64, padded_k * element);
  for (int64_t e = 0; e < form.experts; ++e) {
    int64_t column = 0;
    for (int64_t panel = 0; panel < packed.panels(); ++panel) {
      const int width = packed.panel_width(panel);
      for (int64_t j = 0; j < width; ++j, ++column) {
        ASSERT_LT(column, static_cast<int64_t>(columns.size()));
        const int64_t n = columns[static_cast<size_t>(column)];
        const Channel expected = n < 0 ? Channel() : channel_of(plain, form, e, n);
        const auto where = [&](int64_t k) {
          return "expert " + std::to_string(e) + " panel " + std::to_string(panel) + " column " +
                 std::to_string(j) + " k " + std::to_string(k);
        };
        for (int64_t k = 0; k < padded_k; ++k) {
          const char* at = packed.panel(e, panel) +
                           (k / group * width * group + j * group + k % group) * element;
          int64_t got = 0;
          if (form.dtype == DType::kS8) {
            got = *reinterpret_cast<const int8_t*>(at);
          } else {
            std::memcpy(&got, at, static_cast<size_t>(element));
          }
          const int64_t want = n < 0 || k >= form.k ? 0 : expected.values[static_cast<size_t>(k)];
          ASSERT_EQ(got, want) << where(k);
        }
        if (form.dtype == DType::kS8) {
          ASSERT_EQ(packed.column_sums(e, panel)[j], expected.sum) << where(0);
          const float scale = packed.scales(e, panel)[j];
          if (std::isnan(expected.scale)) {
            ASSERT_TRUE(std::isnan(scale)) << where(0);
          } else {
            ASSERT_EQ(std::bit_cast<uint32_t>(scale), std::bit_cast<uint32_t>(expected.scale))
                << where(0);
          }
        }
      }
    }
    ASSERT_EQ(column, static_cast<int64_t>(columns.size()));
  }
}

bool same_bytes(const PackedWeights& a, const PackedWeights& b) {
  return a.bytes() == b.bytes() &&
         (a.bytes() == 0 || std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0);
}

PackedWeightsForm random_form(Draw& draw) {
  PackedWeightsForm form;
  form.dtype = draw.of({DType::kF32, DType::kBf16, DType::kS8, DType::kS8});
  form.role = draw.of({WeightRole::kPlain, WeightRole::kGateUp});
  form.gate = draw.of({Gate::kLeft, Gate::kRight, Gate::kInterleaved});
  form.experts = draw.between(0, 3);
  form.n = draw.of({draw.between(0, 200), draw.of<int64_t>({1, 31, 32, 33, 48, 64, 128, 130})});
  if (form.role == WeightRole::kGateUp) form.n += form.n % 2;
  form.k = draw.of({draw.between(0, 300), draw.of<int64_t>({1, 3, 4, 16, 63, 64, 65, 128}),
                    draw.between(1000, 1100)});
  return form;
}

DType random_source(Draw& draw, DType to) {
  return to == DType::kS8
             ? draw.of({DType::kF32, DType::kBf16, DType::kF16, DType::kS8, DType::kS8})
             : draw.of({DType::kF32, DType::kBf16, DType::kF16});
}

// All forms, sources, orientations and strides, on every ISA, all at once and expert by expert.
TEST(PackedWeights, EveryElementIsWhereTheLayoutSays) {
  for (uint64_t round = 0; round < 150; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    PackedWeightsForm form = random_form(draw);
    const Plain plain(draw, random_source(draw, form.dtype), form.experts, form.n, form.k);
    form.scales = plain.dtype != DType::kS8 || draw.of({false, true, true});
    const ConstTensorView scales = form.scales ? plain.all_scales() : ConstTensorView();

    PackedWeights first;
    for (const Isa isa : isas()) {
      Context ctx({.threads = static_cast<int>(draw.between(1, 4)), .isa = isa});
      PackedWeights packed;
      const Status status =
          PackedWeights::pack(ctx, {.dtype = form.dtype, .role = form.role, .gate = form.gate},
                              plain.all(), plain.transposed, scales, &packed);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(packed.dtype(), form.dtype);
      EXPECT_EQ(packed.has_scales(), form.dtype == DType::kS8 && form.scales);
      if (isa == Isa::kScalar) {
        ASSERT_NO_FATAL_FAILURE(expect_packed(packed, form, plain));
        first = std::move(packed);
      } else {
        ASSERT_TRUE(same_bytes(packed, first)) << to_string(isa);
      }
    }

    PackedWeights single;
    ASSERT_TRUE(PackedWeights::create(form, &single).ok());
    for (int64_t e = form.experts - 1; e >= 0; --e) {
      const Status status =
          single.pack_expert(e, plain.expert(e), plain.transposed,
                             form.scales ? plain.expert_scales(e) : ConstTensorView());
      ASSERT_TRUE(status.ok()) << status.message();
    }
    ASSERT_TRUE(same_bytes(single, first));
  }
}

// Every f16 and every bf16 there is, and f32 that lie around every rounding to bf16.
TEST(PackedWeights, ConversionsAreExact) {
  constexpr int64_t kN = 64, kK = 1024;
  std::vector<f16> halves;
  std::vector<float> floats;
  std::mt19937_64 random(5);
  for (uint32_t i = 0; i < kN * kK; ++i) {
    halves.push_back({static_cast<uint16_t>(i)});
    const auto offset = static_cast<uint32_t>(std::array{0x7FFF, 0x8000, 0x8001, 1}[i / 3 % 4]);
    floats.push_back(std::bit_cast<float>((i << 16) + offset));
  }
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    const auto value = [](const PackedWeights& packed, int64_t n, int64_t k) {
      const int64_t group = packed.dtype() == DType::kF32 ? 1 : 2;
      const char* at = packed.panel(0, 0) + (k / group * 64 + n) * 4 + k % group * 2;
      uint32_t bits = 0;
      std::memcpy(&bits, at, static_cast<size_t>(4 / group));
      return bits;
    };
    PackedWeights f32, from_f32, from_f16, from_bf16;
    const ConstTensorView half_view(halves.data(), {kN, kK});
    const ConstTensorView bf16_view(halves.data(), TensorLayout(DType::kBf16, {kN, kK}));
    const ConstTensorView f32_view(floats.data(), {kN, kK});
    const PackedWeightsForm to_f32_form{.dtype = DType::kF32}, to_bf16_form{.dtype = DType::kBf16};
    ASSERT_TRUE(PackedWeights::pack(ctx, to_f32_form, half_view, false, {}, &f32).ok());
    ASSERT_TRUE(PackedWeights::pack(ctx, to_f32_form, bf16_view, false, {}, &from_bf16).ok());
    ASSERT_TRUE(PackedWeights::pack(ctx, to_bf16_form, half_view, false, {}, &from_f16).ok());
    ASSERT_TRUE(PackedWeights::pack(ctx, to_bf16_form, f32_view, false, {}, &from_f32).ok());
    for (int64_t i = 0; i < kN * kK; ++i) {
      const int64_t n = i / kK, k = i % kK;
      const auto at = static_cast<size_t>(i);
      const float half = to_f32(halves[at]);
      ASSERT_EQ(value(f32, n, k), std::bit_cast<uint32_t>(half)) << to_string(isa) << i;
      ASSERT_EQ(value(from_f16, n, k), to_bf16(half).bits) << to_string(isa) << i;
      ASSERT_EQ(value(from_f32, n, k), to_bf16(floats[at]).bits) << to_string(isa) << i;
      ASSERT_EQ(value(from_bf16, n, k), std::bit_cast<uint32_t>(to_f32(bf16{halves[at].bits})))
          << to_string(isa) << i;
    }
  }
}

// Channels that quantisation has to think about.
TEST(PackedWeights, QuantisesEveryKindOfChannel) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kTiny = 0x1p-130f;  // 127 / kTiny is infinite
  const std::vector<std::vector<float>> w = {
      {0, -0.0f, 0, 0, 0, 0},
      {1, kInf, 2, 0, 0, 0},
      {1, NAN, 2, 0, 0, 0},
      {NAN, -kInf, 0, 0, 0, 0},
      {kTiny, -kTiny, kTiny / 2, 0, -0.0f, 0},
      {127, 0.5f, 1.5f, -2.5f, -126.5f, 125.5f},  // ties go to even
      {-3e38f, 3e38f, 1e38f, 1, -1, 0},
      {1e-36f, -1e-37f, 4e-37f, 0, 0, 0},
  };
  const std::vector<std::vector<int>> expected = {
      {0, 0, 0, 0, 0, 0},       {0, 0, 0, 0, 0, 0},        {0, 0, 0, 0, 0, 0},
      {0, 0, 0, 0, 0, 0},       {127, -127, 127, 0, 0, 0}, {127, 0, 2, -2, -126, 126},
      {-127, 127, 42, 0, 0, 0}, {127, -13, 51, 0, 0, 0},
  };
  std::vector<float> rows, columns;
  for (const auto& channel : w) rows.insert(rows.end(), channel.begin(), channel.end());
  for (size_t k = 0; k < 6; ++k) {
    for (const auto& channel : w) columns.push_back(channel[k]);
  }
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    for (const bool transposed : {false, true}) {
      PackedWeights packed;
      const Status status = PackedWeights::pack(ctx, {.dtype = DType::kS8},
                                                transposed ? ConstTensorView(columns.data(), {6, 8})
                                                           : ConstTensorView(rows.data(), {8, 6}),
                                                transposed, {}, &packed);
      ASSERT_TRUE(status.ok()) << status.message();
      for (size_t n = 0; n < 8; ++n) {
        int32_t sum = 0;
        for (size_t k = 0; k < 6; ++k) {
          const auto q =
              reinterpret_cast<const int8_t*>(packed.panel(0, 0))[k / 4 * 32 * 4 + n * 4 + k % 4];
          EXPECT_EQ(q, expected[n][k]) << to_string(isa) << " channel " << n << " k " << k;
          sum += q;
        }
        EXPECT_EQ(packed.column_sums(0, 0)[n], sum);
        const float scale = packed.scales(0, 0)[n];
        if (n >= 1 && n <= 3) {
          EXPECT_TRUE(std::isnan(scale)) << n;
        } else {
          float max = 0;
          for (const float x : w[n]) max = std::fmax(max, std::fabs(x));
          EXPECT_EQ(scale, max / 127.0f) << n;
        }
      }
    }
  }
}

TEST(PackedWeights, SumsOfTheLargestK) {
  const std::vector<int8_t> w(65536, -128);
  PackedWeights packed;
  ASSERT_TRUE(PackedWeights::create(
                  {.dtype = DType::kS8, .experts = 1, .n = 1, .k = 65536, .scales = false}, &packed)
                  .ok());
  ASSERT_TRUE(packed.pack_expert(0, {w.data(), {1, 65536}}).ok());
  EXPECT_EQ(packed.column_sums(0, 0)[0], -128 * 65536);
  EXPECT_EQ(packed.column_sums(0, 0)[1], 0);
}

// Gate and up apart give what they give together.
TEST(PackedWeights, GateAndUpApart) {
  for (uint64_t round = 0; round < 40; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    PackedWeightsForm form = random_form(draw);
    form.role = WeightRole::kGateUp;
    form.n += form.n % 2;
    form.experts = 1;
    const Plain plain(draw, random_source(draw, form.dtype), 1, form.n, form.k);
    const int64_t I = form.n / 2;
    PackedWeights together;
    form.gate = Gate::kLeft;
    ASSERT_TRUE(PackedWeights::create(form, &together).ok());
    ASSERT_TRUE(
        together.pack_expert(0, plain.expert(0), plain.transposed, plain.expert_scales(0)).ok());

    // The first half where it is; a copy of the second one, its rows dense.
    ConstTensorView gate = plain.expert(0);
    gate.shape[plain.transposed ? 1 : 0] = I;
    const auto element = static_cast<size_t>(size_of(plain.dtype));
    std::vector<char> copy(static_cast<size_t>(I * form.k) * element);
    for (int64_t i = 0; i < I; ++i) {
      for (int64_t k = 0; k < form.k; ++k) {
        const auto to = static_cast<size_t>(plain.transposed ? k * I + i : i * form.k + k);
        std::memcpy(copy.data() + to * element, plain.at(0, I + i, k), element);
      }
    }
    const ConstTensorView up(copy.data(), plain.transposed
                                              ? TensorLayout(plain.dtype, {form.k, I})
                                              : TensorLayout(plain.dtype, {I, form.k}));
    ConstTensorView gate_scale, up_scale;
    if (plain.dtype == DType::kS8) {
      gate_scale = ConstTensorView(plain.scales.data(), {I});
      up_scale = ConstTensorView(plain.scales.data() + I, {I});
    }
    PackedWeights apart;
    form.gate = draw.of({Gate::kLeft, Gate::kRight, Gate::kInterleaved});
    ASSERT_TRUE(PackedWeights::create(form, &apart).ok());
    const Status status =
        apart.pack_expert_halves(0, gate, up, plain.transposed, gate_scale, up_scale);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE(same_bytes(apart, together));
  }
}

TEST(PackedWeights, OneScaleForAllChannels) {
  const std::vector<int8_t> w(2 * 40 * 8, 1);
  const float scale = 0.25f;
  Context ctx;
  PackedWeights packed;
  ASSERT_TRUE(PackedWeights::pack(ctx, {.dtype = DType::kS8}, {w.data(), {2, 40, 8}}, false,
                                  {&scale, {1}}, &packed)
                  .ok());
  for (int64_t e = 0; e < 2; ++e) {
    for (int n = 0; n < 48; ++n) EXPECT_EQ(packed.scales(e, 0)[n], n < 40 ? 0.25f : 0.0f);
  }
  const float other = 0.5f;
  ASSERT_TRUE(packed.pack_expert(1, {w.data(), {40, 8}}, false, {&other, {1}}).ok());
  EXPECT_EQ(packed.scales(0, 0)[39], 0.25f);
  EXPECT_EQ(packed.scales(1, 0)[39], 0.5f);
  EXPECT_EQ(packed.scales(1, 0)[40], 0.0f);
}

TEST(PackedWeights, Sizes) {
  PackedWeights packed;
  ASSERT_TRUE(
      PackedWeights::create({.dtype = DType::kF32, .experts = 3, .n = 100, .k = 7}, &packed).ok());
  EXPECT_EQ(packed.panels(), 2);
  EXPECT_EQ(packed.panel_width(0), 64);
  EXPECT_EQ(packed.panel_width(1), 48);  // for 36 columns
  EXPECT_EQ(packed.bytes(), 3 * (64 + 48) * 16 * 4);
  EXPECT_FALSE(packed.has_scales());
  // The bound on real shapes: N and K of both GEMMs of a layer.
  struct Gemm {
    int64_t n, k;
    WeightRole role;
  };
  for (const Gemm& gemm : {Gemm{1536, 2048, WeightRole::kGateUp},
                           {2048, 768, WeightRole::kPlain},
                           {5760, 2880, WeightRole::kGateUp},
                           {2880, 2880, WeightRole::kPlain},
                           {28672, 4096, WeightRole::kGateUp},
                           {4096, 14336, WeightRole::kPlain},
                           {4096, 7168, WeightRole::kGateUp},
                           {7168, 2048, WeightRole::kPlain}}) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kS8}) {
      ASSERT_TRUE(
          PackedWeights::create(
              {.dtype = dtype, .experts = 2, .n = gemm.n, .k = gemm.k, .role = gemm.role}, &packed)
              .ok());
      EXPECT_LE(static_cast<double>(packed.bytes()),
                1.05 * static_cast<double>(2 * gemm.n * gemm.k * size_of(dtype)))
          << gemm.n << "x" << gemm.k << " " << to_string(dtype);
    }
  }
}

// Views without elements need no memory.
TEST(PackedWeights, EmptyViews) {
  Context ctx;
  for (const DType dtype : {DType::kF32, DType::kS8}) {
    for (const bool transposed : {false, true}) {
      PackedWeights packed;
      const TensorLayout no_k = transposed ? TensorLayout(DType::kF32, {3, 0, 40}, 50)
                                           : TensorLayout(DType::kF32, {3, 40, 0}, 5);
      ASSERT_TRUE(
          PackedWeights::pack(ctx, {.dtype = dtype}, {nullptr, no_k}, transposed, {}, &packed)
              .ok());
      EXPECT_EQ(packed.panels(), 1);
      EXPECT_EQ(packed.k_chunks(), 0);
      if (dtype == DType::kS8) {
        EXPECT_EQ(packed.scales(2, 0)[39], 0.0f);
        EXPECT_EQ(packed.column_sums(2, 0)[39], 0);
      }
      const TensorLayout no_n = transposed ? TensorLayout(DType::kF32, {3, 40, 0}, 5)
                                           : TensorLayout(DType::kF32, {3, 0, 40}, 50);
      ASSERT_TRUE(
          PackedWeights::pack(ctx, {.dtype = dtype}, {nullptr, no_n}, transposed, {}, &packed)
              .ok());
      EXPECT_EQ(packed.panels(), 0);
      EXPECT_EQ(packed.bytes(), 0);
    }
  }
}

TEST(PackedWeights, MovedFromHoldsNothing) {
  PackedWeights packed;
  ASSERT_TRUE(
      PackedWeights::create({.dtype = DType::kF32, .experts = 1, .n = 3, .k = 4}, &packed).ok());
  const PackedWeights other = std::move(packed);
  EXPECT_TRUE(other.packed());
  EXPECT_FALSE(packed.packed());  // NOLINT(bugprone-use-after-move)
  EXPECT_EQ(packed.dtype(), DType::kNone);
  EXPECT_EQ(packed.bytes(), 0);
  EXPECT_EQ(packed.data(), nullptr);
}

// Different experts from different threads at once.
TEST(PackedWeights, ExpertsAtOnce) {
  Draw draw(41);
  const PackedWeightsForm form{
      .dtype = DType::kS8, .experts = 8, .n = 130, .k = 300, .role = WeightRole::kGateUp};
  const Plain plain(draw, DType::kBf16, form.experts, form.n, form.k);
  PackedWeights packed;
  ASSERT_TRUE(PackedWeights::create(form, &packed).ok());
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int64_t e = t; e < 8; e += 4) {
        EXPECT_TRUE(packed.pack_expert(e, plain.expert(e), plain.transposed).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect_packed(packed, form, plain);
}

// --- errors ---

TEST(PackedWeights, RefusesForms) {
  PackedWeights packed;
  const auto refused = [&](const PackedWeightsForm& form, const char* message) {
    expect_refused(PackedWeights::create(form, &packed), message);
    EXPECT_FALSE(packed.packed()) << "a failed create changed the object";
  };
  const PackedWeightsForm good{.dtype = DType::kS8, .experts = 1, .n = 2, .k = 2};
  PackedWeightsForm form = good;
  form.dtype = DType::kF16;
  refused(form, "PackedWeights: form.dtype = f16 is not f32, bf16 or s8");
  form = good;
  form.n = -2;
  refused(form, "PackedWeights: a size of [1, -2, 2] is negative");
  form = good;
  form.k = 65537;
  refused(form, "PackedWeights: form.k = 65537 is more than 65536, beyond which s32 overflows");
  form = good;
  form.role = WeightRole::kGateUp;
  form.n = 3;
  refused(form, "PackedWeights: form.n = 3 is odd: gate and up have as many channels each");
  form = good;
  form.role = static_cast<WeightRole>(2);
  refused(form, "PackedWeights: form.role = 2 is not one of its 2 choices");
  form.role = static_cast<WeightRole>(255);
  refused(form, "PackedWeights: form.role = 255 is not one of its 2 choices");
  form = good;
  form.gate = static_cast<Gate>(3);
  refused(form, "PackedWeights: form.gate = 3 is not one of its 3 choices");
  form.gate = static_cast<Gate>(-1);
  refused(form, "PackedWeights: form.gate = -1 is not one of its 3 choices");
  form = good;
  for (const int dtype : {8, 255}) {
    form.dtype = static_cast<DType>(dtype);
    refused(form, "PackedWeights: form.dtype = unknown is not f32, bf16 or s8");
  }
  form = {.dtype = DType::kF32, .experts = int64_t{1} << 40, .n = int64_t{1} << 20, .k = 64};
  refused(form, "PackedWeights: the product of [1099511627776, 1048576, 64] overflows");
  form = {.dtype = DType::kF32, .experts = 1, .n = INT64_MAX, .k = 0};
  refused(form, "PackedWeights: the product of [1, 9223372036854775807, 0] overflows");
  form = {.dtype = DType::kF32, .experts = 1, .n = int64_t{1} << 30, .k = int64_t{1} << 28};
  EXPECT_EQ(PackedWeights::create(form, &packed).code(), StatusCode::kOutOfMemory);
  EXPECT_FALSE(packed.packed());
}

// The two views of a pack, for the sweep.
struct PackArgs {
  ConstTensorView w;
  ConstTensorView w_scale;
};

TEST(PackedWeights, RefusesEveryMalformedView) {
  const std::vector<int8_t> w(2 * 5 * 7, 3);
  const std::vector<float> scale(2 * 5, 1.0f);
  PackedWeights packed;
  ASSERT_TRUE(
      PackedWeights::create({.dtype = DType::kS8, .experts = 2, .n = 5, .k = 7}, &packed).ok());
  const std::string zeros(static_cast<size_t>(packed.bytes() / 2), '\0');
  // The sweep begins with the good call, which packs the first expert; the others must not touch
  // the second.
  int64_t expert = 0;
  test::sweep_contract(PackArgs{{w.data(), {5, 7}}, {scale.data(), {5}}},
                       {{"w", &PackArgs::w}, {"w_scale", &PackArgs::w_scale}}, {},
                       [&](const PackArgs& args) {
                         const int64_t to = expert;
                         expert = 1;
                         return packed.pack_expert(to, args.w, false, args.w_scale);
                       });
  EXPECT_EQ(0, std::memcmp(packed.panel(1, 0), zeros.data(), zeros.size()));

  struct Halves {
    ConstTensorView gate, up, gate_scale, up_scale;
  };
  PackedWeights halves;
  ASSERT_TRUE(PackedWeights::create(
                  {.dtype = DType::kS8, .experts = 2, .n = 10, .k = 7, .role = WeightRole::kGateUp},
                  &halves)
                  .ok());
  const std::string more_zeros(static_cast<size_t>(halves.bytes() / 2), '\0');
  expert = 0;
  test::sweep_contract(Halves{{w.data(), {5, 7}},
                              {w.data() + 35, {5, 7}},
                              {scale.data(), {5}},
                              {scale.data() + 5, {5}}},
                       {{"gate", &Halves::gate},
                        {"up", &Halves::up},
                        {"gate_scale", &Halves::gate_scale},
                        {"up_scale", &Halves::up_scale}},
                       {}, [&](const Halves& args) {
                         const int64_t to = expert;
                         expert = 1;
                         return halves.pack_expert_halves(to, args.gate, args.up, false,
                                                          args.gate_scale, args.up_scale);
                       });
  EXPECT_EQ(0, std::memcmp(halves.panel(1, 0), more_zeros.data(), more_zeros.size()));

  Context ctx;
  const PackArgs all{{w.data(), {2, 5, 7}}, {scale.data(), {2, 5}}};
  const auto pack_all = [&](const PackArgs& args) {
    PackedWeights out;
    const Status status =
        PackedWeights::pack(ctx, {.dtype = DType::kS8}, args.w, false, args.w_scale, &out);
    EXPECT_EQ(out.packed(), status.ok());
    return status;
  };
  test::sweep_contract(all, {{"w_scale", &PackArgs::w_scale, false}}, {}, pack_all);
  for (const auto& [what, view] : test::sweep_internal::malformed(all.w)) {
    if (what == "smaller shape[2]") continue;  // K is whatever w has
    EXPECT_EQ(pack_all({view, all.w_scale}).code(), StatusCode::kInvalidArgument) << what;
  }
}

TEST(PackedWeights, RefusesWhatCannotBePacked) {
  const std::vector<float> f(12, 1.0f);
  const std::vector<int8_t> q(12, 1);
  const ConstTensorView float_w(f.data(), {3, 4}), s8_w(q.data(), {3, 4});
  const ConstTensorView scale(f.data(), {3});
  PackedWeights nothing, f32, s8, bare;
  ASSERT_TRUE(
      PackedWeights::create({.dtype = DType::kF32, .experts = 2, .n = 3, .k = 4}, &f32).ok());
  ASSERT_TRUE(PackedWeights::create({.dtype = DType::kS8, .experts = 2, .n = 3, .k = 4}, &s8).ok());
  ASSERT_TRUE(PackedWeights::create(
                  {.dtype = DType::kS8, .experts = 2, .n = 3, .k = 4, .scales = false}, &bare)
                  .ok());
  expect_refused(nothing.pack_expert(0, float_w),
                 "PackedWeights::pack_expert: nothing was created yet");
  expect_refused(f32.pack_expert(2, float_w),
                 "PackedWeights::pack_expert: expert = 2 is not in [0, 2)");
  expect_refused(f32.pack_expert(-1, float_w),
                 "PackedWeights::pack_expert: expert = -1 is not in [0, 2)");
  expect_refused(f32.pack_expert(0, float_w, true),
                 "PackedWeights::pack_expert: w.shape[0] = 3, expected 4");
  expect_refused(f32.pack_expert(0, s8_w),
                 "PackedWeights::pack_expert: w has dtype s8, which is not legal here");
  expect_refused(f32.pack_expert(0, float_w, false, scale),
                 "PackedWeights::pack_expert: w_scale is given, but w is not s8");
  expect_refused(s8.pack_expert(0, float_w, false, scale),
                 "PackedWeights::pack_expert: w_scale is given, but w is not s8");
  expect_refused(s8.pack_expert(0, s8_w), "PackedWeights::pack_expert: w_scale is missing");
  expect_refused(bare.pack_expert(0, float_w),
                 "PackedWeights::pack_expert: w is quantised, but the pack has no scales");
  expect_refused(bare.pack_expert(0, s8_w, false, scale),
                 "PackedWeights::pack_expert: w_scale is given, but the pack has no scales");
  expect_refused(f32.pack_expert(0, {f32.panel(0, 0), TensorLayout(DType::kF32, {3, 4})}),
                 "PackedWeights::pack_expert: output expert overlaps input w");
  EXPECT_TRUE(f32.pack_expert(1, {f32.panel(0, 0), TensorLayout(DType::kF32, {3, 4})}).ok());

  expect_refused(f32.pack_expert_halves(0, float_w, float_w),
                 "PackedWeights::pack_expert_halves: the pack's role is not gate and up");
  PackedWeights halves;
  ASSERT_TRUE(
      PackedWeights::create(
          {.dtype = DType::kS8, .experts = 1, .n = 6, .k = 4, .role = WeightRole::kGateUp}, &halves)
          .ok());
  expect_refused(halves.pack_expert_halves(0, float_w, s8_w, false, {}, scale),
                 "PackedWeights::pack_expert_halves: gate is f32, but up is s8");

  Context ctx;
  expect_refused(PackedWeights::pack(ctx, {.dtype = DType::kF32}, s8_w, false, {}, &nothing),
                 "PackedWeights::pack: w has dtype s8, which is not legal here");
  expect_refused(PackedWeights::pack(ctx, {.dtype = DType::kS8}, float_w, false, scale, &nothing),
                 "PackedWeights::pack: w_scale is given, but w is not s8");
  expect_refused(
      PackedWeights::pack(ctx, {q.data(), TensorLayout(DType::kF16, {3, 2})}, false, &nothing),
      "PackedWeights: form.dtype = f16 is not f32, bf16 or s8");
  Context bad({.threads = -1});
  EXPECT_EQ(PackedWeights::pack(bad, float_w, false, &nothing).code(),
            StatusCode::kInvalidArgument);
  EXPECT_FALSE(nothing.packed());
}

// --- files ---

// A folder of the test's own, gone with the test.
class PackedWeightsFile : public testing::Test {
 protected:
  PackedWeightsFile()
      : folder_(std::filesystem::path(testing::TempDir()) /
                ("moeops_packed_weights_" + std::to_string(::getpid()))) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
    path_ = (folder_ / "w").string();
  }
  ~PackedWeightsFile() override { std::filesystem::remove_all(folder_); }

  std::string read() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void write(const std::string& bytes) const { std::ofstream(path_, std::ios::binary) << bytes; }
  int64_t files() const { return std::distance(std::filesystem::directory_iterator(folder_), {}); }
  void refused(const std::string& why) const {
    PackedWeights out;
    expect_refused(PackedWeights::map(path_.c_str(), &out),
                   "PackedWeights::map: " + path_ + ": " + why);
    EXPECT_FALSE(out.packed());
  }

  std::filesystem::path folder_;
  std::string path_;
};

TEST_F(PackedWeightsFile, RoundTrip) {
  for (uint64_t round = 0; round < 40; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    PackedWeightsForm form = random_form(draw);
    const Plain plain(draw, random_source(draw, form.dtype), form.experts, form.n, form.k);
    form.scales = plain.dtype != DType::kS8 || draw.of({false, true});
    Context ctx;
    PackedWeights packed;
    ASSERT_TRUE(PackedWeights::pack(ctx, form, plain.all(), plain.transposed,
                                    form.scales ? plain.all_scales() : ConstTensorView(), &packed)
                    .ok());
    const Status saved = packed.save(path_.c_str());
    ASSERT_TRUE(saved.ok()) << saved.message();
    EXPECT_EQ(files(), 1);
    PackedWeights mapped;
    const Status status = PackedWeights::map(path_.c_str(), &mapped);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(mapped.dtype(), packed.dtype());
    EXPECT_EQ(mapped.experts(), packed.experts());
    EXPECT_EQ(mapped.n(), packed.n());
    EXPECT_EQ(mapped.k(), packed.k());
    EXPECT_EQ(mapped.form().role, packed.form().role);
    EXPECT_EQ(mapped.form().gate, packed.form().gate);
    EXPECT_EQ(mapped.has_scales(), packed.has_scales());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(mapped.data()) % 64, 0u);
    ASSERT_TRUE(same_bytes(mapped, packed));
    ASSERT_NO_FATAL_FAILURE(expect_packed(mapped, form, plain));
    if (form.experts > 0) {
      expect_refused(
          mapped.pack_expert(0, plain.expert(0), plain.transposed),
          "PackedWeights::pack_expert: the pack is mapped from a file, which is read-only");
    }
    // It may be saved over itself: the mapping keeps the old file.
    ASSERT_TRUE(mapped.save(path_.c_str()).ok());
    ASSERT_TRUE(same_bytes(mapped, packed));
  }
}

TEST_F(PackedWeightsFile, RefusesWhatIsNoPack) {
  PackedWeights out;
  refused("No such file or directory");
  write("");
  refused("too short to be packed weights");
  write(std::string(4095, 'x'));
  refused("too short to be packed weights");
  write(std::string(5000, 'x'));
  refused("not packed weights");
  std::filesystem::remove(path_);
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  refused("not a regular file");
  std::filesystem::remove(path_);
  std::filesystem::create_directory(path_);
  refused("not a regular file");
  expect_refused(PackedWeights::map(nullptr, &out), "PackedWeights::map: path is null");
}

// Every byte of the header, changed, and sizes that lie with a checksum that is right.
TEST_F(PackedWeightsFile, RefusesDamagedFiles) {
  PackedWeights packed;
  ASSERT_TRUE(
      PackedWeights::create({.dtype = DType::kS8, .experts = 3, .n = 40, .k = 100}, &packed).ok());
  ASSERT_TRUE(packed.save(path_.c_str()).ok());
  const std::string good = read();
  ASSERT_EQ(good.size(), static_cast<size_t>(4096 + packed.bytes()));

  PackedWeights out;
  for (const size_t size :
       {size_t{0}, size_t{79}, size_t{4095}, size_t{4096}, good.size() / 2, good.size() - 1}) {
    write(good.substr(0, size));
    EXPECT_EQ(PackedWeights::map(path_.c_str(), &out).code(), StatusCode::kInvalidArgument) << size;
  }
  write(good + "x");
  refused(std::to_string(good.size() + 1) + " bytes, but its header says " +
          std::to_string(good.size()));
  for (size_t i = 0; i < 80; ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 0x40);
    write(bad);
    EXPECT_EQ(PackedWeights::map(path_.c_str(), &out).code(), StatusCode::kInvalidArgument) << i;
  }

  const auto forge = [&](size_t at, uint64_t value, size_t size) {
    std::string bad = good;
    std::memcpy(bad.data() + at, &value, size);
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < 72; ++i) hash = (hash ^ static_cast<uint8_t>(bad[i])) * 0x100000001B3u;
    std::memcpy(bad.data() + 72, &hash, sizeof(hash));
    write(bad);
  };
  forge(8, 3, 4);
  refused("layout version 3, expected 2: pack it again");
  forge(12, 3, 4);
  refused("PackedWeights: form.dtype = f16 is not f32, bf16 or s8");
  forge(12, 0x104, 4);
  refused("the header makes no sense");
  forge(16, 2, 4);
  refused("PackedWeights: form.role = 2 is not one of its 2 choices");
  forge(20, 3, 4);
  refused("the header makes no sense");
  forge(24, 2, 4);
  refused("the header makes no sense");
  forge(32, INT64_MAX, 8);
  refused("PackedWeights: the product of [9223372036854775807, 40, 100] overflows");
  forge(40, static_cast<uint64_t>(-40), 8);
  refused("PackedWeights: a size of [3, -40, 100] is negative");
  forge(48, 65537, 8);
  refused("PackedWeights: form.k = 65537 is more than 65536, beyond which s32 overflows");
  forge(56, 64, 8);
  refused(std::to_string(packed.bytes()) + " bytes of weights, expected 3 experts of " +
          std::to_string(packed.bytes() / 3));
  forge(64, 4096, 8);
  refused(std::to_string(good.size()) + " bytes, but its header says 4096");
  for (const size_t at : {size_t{32}, size_t{40}, size_t{48}}) {
    for (const uint64_t value : {0u, 1u, 2u, 1000u, 65536u}) {
      forge(at, value, 8);
      EXPECT_EQ(PackedWeights::map(path_.c_str(), &out).code(), StatusCode::kInvalidArgument)
          << at << " " << value;
    }
  }
  forge(24, 1, 4);  // as it was: the forger's checksum is the right one
  EXPECT_TRUE(PackedWeights::map(path_.c_str(), &out).ok());
}

TEST_F(PackedWeightsFile, RefusesToSave) {
  PackedWeights packed;
  expect_refused(packed.save(path_.c_str()), "PackedWeights::save: nothing is packed");
  ASSERT_TRUE(
      PackedWeights::create({.dtype = DType::kF32, .experts = 1, .n = 1, .k = 1}, &packed).ok());
  expect_refused(packed.save(nullptr), "PackedWeights::save: path is null");
  const std::string nowhere = (folder_ / "none" / "w").string();
  expect_refused(packed.save(nowhere.c_str()),
                 "PackedWeights::save: " + nowhere +
                     ": cannot create a file beside it: No such file or directory");
  const std::string folder = folder_.string();
  expect_refused(packed.save(folder.c_str()),
                 "PackedWeights::save: " + folder + ": not a regular file");
  expect_refused(packed.save("/dev/full"), "PackedWeights::save: /dev/full: not a regular file");
  EXPECT_EQ(packed.save(std::string(5000, 'a').c_str()).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(files(), 0);
}

}  // namespace
}  // namespace moeops

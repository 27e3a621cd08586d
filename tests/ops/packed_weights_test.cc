// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/packed_weights.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ref/numeric.h"
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

}  // namespace
}  // namespace moeops

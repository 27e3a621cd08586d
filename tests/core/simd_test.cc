// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/core/simd_probe.h"
#include "tests/support/guarded_buffer.h"

namespace moeops {
namespace {

using test::GuardedBuffer;
using test::SimdProbe;

std::vector<const SimdProbe*> probes() {
  std::vector<const SimdProbe*> all;
  for (const SimdProbe* probe :
       {&test::simd_probe_scalar, &test::simd_probe_avx2, &test::simd_probe_avx512}) {
    if (probe->isa <= machine().isa) all.push_back(probe);
  }
  return all;
}

// Tests over all f32 patterns take every n-th of them; MOEOPS_TEST_STRIDE=1 runs them all (a
// quarter of an hour).
uint32_t pattern_stride() {
  const char* stride = std::getenv("MOEOPS_TEST_STRIDE");
  return stride != nullptr ? static_cast<uint32_t>(std::strtoul(stride, nullptr, 10)) : 1021;
}

// Calls visit(values) with blocks of the patterns. The last block is shorter, so that tails of
// many lengths are tried too.
template <class Visitor>
void for_all_patterns(Visitor visit) {
  const uint64_t stride = pattern_stride();
  std::vector<float> values;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32;) {
    values.clear();
    for (; values.size() < 4096 + bits % 31 && bits < uint64_t{1} << 32; bits += stride) {
      values.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
    }
    visit(values);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// |got - exact| in units of the last place that an f32 of exact's size has.
double ulps(float got, double exact) {
  if (std::isnan(exact)) return std::isnan(got) ? 0 : INFINITY;
  const double top = 0x1.ffffffp+127;  // from here on, rounding gives infinity
  if (std::fabs(exact) >= top) exact = std::copysign(INFINITY, exact);
  if (std::isinf(got) || std::isinf(exact)) return static_cast<double>(got) == exact ? 0 : INFINITY;
  const int exponent = static_cast<int>(std::bit_cast<uint64_t>(exact) >> 52 & 0x7FF) - 1023;
  const auto per_unit = static_cast<uint64_t>(1023 + 23 - std::max(exponent, -126)) << 52;
  return std::fabs(static_cast<double>(got) - exact) * std::bit_cast<double>(per_unit);
}

struct MathFunction {
  const char* name;
  SimdProbe::Unary SimdProbe::*function;
  double (*exact)(double x);
  double (*error)(float x, float got, double exact);
  double bound;
};

double any_ulps(float, float got, double exact) { return ulps(got, exact); }
double exact_gelu_tanh(double x) {
  const double z = 0.7978845608028654 * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(-2 * z));
}
// In units of 2^-24 of x for x < 0, where the result is a small remainder of x; else ulp.
double gelu_error(float x, float got, double exact) {
  if (!(x < 0) || std::isinf(x)) return ulps(got, exact);
  if (std::isnan(got)) return INFINITY;
  const double unit = std::max(-static_cast<double>(x) * 0x1p-24, 0x1p-149);
  return std::fabs(static_cast<double>(got) - exact) / unit;
}
// Of silu's left tail, where e^-x is infinite in f32 (the formula's own limit), what counts is
// that it vanishes.
double silu_error(float x, float got, double exact) {
  if (x < -88.72f && !std::isinf(x)) {
    return std::fabs(static_cast<double>(got)) <= 0x1p-120 ? 0 : INFINITY;
  }
  return ulps(got, exact);
}
double sigmoid_error(float x, float got, double exact) {
  if (x < -88.72f) return got >= 0 && got <= 0x1p-127f ? 0 : INFINITY;
  return ulps(got, exact);
}

const MathFunction kFunctions[] = {
    {"exp", &SimdProbe::exp, [](double x) { return std::exp(x); }, any_ulps, 2},
    {"sigmoid", &SimdProbe::sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }, sigmoid_error,
     4},
    {"silu", &SimdProbe::silu, [](double x) { return x / (1 + std::exp(-x)); }, silu_error, 4},
    {"gelu_tanh", &SimdProbe::gelu_tanh, exact_gelu_tanh, gelu_error, 4},
};

// The scalar rung against the exact value, and the others against its bits.
TEST(SimdMath, WithinTheStatedErrorOnEveryPattern) {
  for (const MathFunction& f : kFunctions) {
    double worst = 0;
    float worst_at = 0;
    std::vector<float> scalar;
    std::vector<float> got;
    for_all_patterns([&](const std::vector<float>& x) {
      const auto n = static_cast<int64_t>(x.size());
      scalar.resize(x.size());
      got.resize(x.size());
      (test::simd_probe_scalar.*f.function)(x.data(), scalar.data(), n);
      for (size_t i = 0; i < x.size(); ++i) {
        const double error = f.error(x[i], scalar[i], f.exact(static_cast<double>(x[i])));
        if (error > worst) {
          worst = error;
          worst_at = x[i];
        }
      }
      for (const SimdProbe* probe : probes()) {
        (probe->*f.function)(x.data(), got.data(), n);
        for (size_t i = 0; i < x.size(); ++i) {
          if (std::isnan(got[i]) && std::isnan(scalar[i])) continue;
          ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(scalar[i]))
              << f.name << "(" << x[i] << ") on " << to_string(probe->isa);
        }
      }
    });
    std::printf("%s: worst error %.4f at %a\n", f.name, worst, static_cast<double>(worst_at));
    EXPECT_LE(worst, f.bound) << f.name << " at " << worst_at;
  }
}

TEST(SimdMath, EdgesOfExp) {
  const std::vector<float> x = {88.722831f, 88.722839f, -87.33655f, -103.97207f, -103.97209f,
                                -104.5f,    INFINITY,   -INFINITY,  NAN,         0.0f,
                                -0.0f,      3e38f,      -3e38f,     1e-40f};
  std::vector<float> y(x.size());
  for (const SimdProbe* probe : probes()) {
    probe->exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
    EXPECT_LT(y[0], INFINITY);
    EXPECT_EQ(y[1], INFINITY);
    EXPECT_EQ(y[2], static_cast<float>(std::exp(static_cast<double>(x[2]))));
    EXPECT_EQ(y[3], 0x1p-149f);
    EXPECT_EQ(y[4], 0.0f);
    EXPECT_EQ(y[5], 0.0f);
    EXPECT_EQ(y[6], INFINITY);
    EXPECT_EQ(y[7], 0.0f);
    EXPECT_TRUE(std::isnan(y[8]));
    EXPECT_EQ(y[9], 1.0f);
    EXPECT_EQ(y[10], 1.0f);
    EXPECT_EQ(y[11], INFINITY);
    EXPECT_EQ(y[12], 0.0f);
    EXPECT_EQ(y[13], 1.0f);
  }
}

// bf16, f16, s8, u8 from every pattern; the formats' definition is dtype.h, which has its own
// test against the reference.
TEST(Simd, NarrowingStores) {
  std::vector<bf16> brain;
  std::vector<f16> half;
  std::vector<int8_t> s8;
  std::vector<uint8_t> u8;
  for_all_patterns([&](const std::vector<float>& x) {
    const auto n = static_cast<int64_t>(x.size());
    brain.resize(x.size());
    half.resize(x.size());
    s8.resize(x.size());
    u8.resize(x.size());
    for (const SimdProbe* probe : probes()) {
      probe->f32_to_bf16(x.data(), brain.data(), n);
      probe->f32_to_f16(x.data(), half.data(), n);
      probe->f32_to_s8(x.data(), s8.data(), n);
      probe->f32_to_u8(x.data(), u8.data(), n);
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(brain[i].bits, to_bf16(x[i]).bits) << x[i] << " on " << to_string(probe->isa);
        ASSERT_EQ(half[i].bits, to_f16(x[i]).bits) << x[i] << " on " << to_string(probe->isa);
        const float clamped = std::fmin(std::fmax(std::nearbyint(x[i]), -128.0f), 127.0f);
        const int q = std::isnan(x[i]) ? 0 : static_cast<int>(clamped);
        ASSERT_EQ(s8[i], q) << x[i] << " on " << to_string(probe->isa);
        ASSERT_EQ(u8[i], q + 128) << x[i] << " on " << to_string(probe->isa);
      }
      const auto whole = static_cast<size_t>(n / (2 * probe->width) * (2 * probe->width));
      probe->f32_to_bf16_by_twos(x.data(), brain.data(), static_cast<int64_t>(whole));
      for (size_t i = 0; i < whole; ++i) {
        // Of NaN, those that arithmetic makes of bf16.
        if (std::isnan(x[i]) && (std::bit_cast<uint32_t>(x[i]) & 0x0040FFFF) != 0x00400000)
          continue;
        ASSERT_EQ(brain[i].bits, to_bf16(x[i]).bits) << x[i] << " on " << to_string(probe->isa);
      }
    }
  });
}

TEST(Simd, NarrowingTies) {
  std::vector<float> x;
  for (int i = -260; i <= 260; ++i) x.push_back(static_cast<float>(i) * 0.5f);
  std::vector<int8_t> s8(x.size());
  for (const SimdProbe* probe : probes()) {
    probe->f32_to_s8(x.data(), s8.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(s8[i], static_cast<int>(std::fmin(std::fmax(std::nearbyint(x[i]), -128), 127)))
          << x[i];
    }
  }
}

TEST(Simd, WideningLoads) {
  std::vector<bf16> brain(65536);
  std::vector<f16> half(65536);
  for (size_t i = 0; i < 65536; ++i) {
    brain[i].bits = half[i].bits = static_cast<uint16_t>(i);
  }
  std::vector<float> y(65536);
  for (const SimdProbe* probe : probes()) {
    probe->bf16_to_f32(brain.data(), y.data(), 65536);
    for (size_t i = 0; i < 65536; ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(y[i]), std::bit_cast<uint32_t>(to_f32(brain[i]))) << i;
    }
    probe->f16_to_f32(half.data(), y.data(), 65536);
    for (size_t i = 0; i < 65536; ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(y[i]), std::bit_cast<uint32_t>(to_f32(half[i]))) << i;
    }
  }
}

// Values that expose a wrong operand order, a lost sign of zero, a flushed subnormal.
std::vector<float> awkward(std::mt19937& random, size_t count) {
  const float special[] = {0.0f, -0.0f,  1.0f,    -1.0f, INFINITY, -INFINITY,
                           NAN,  1e-42f, -1e-42f, 3e38f, 1.5f,     -2.5f};
  std::vector<float> values(count);
  for (float& v : values) {
    const auto r = static_cast<uint32_t>(random());
    v = r % 3 == 0 ? special[r / 3 % std::size(special)]
                   : std::bit_cast<float>(static_cast<uint32_t>(random()));
  }
  return values;
}

void expect_same(const std::vector<float>& got, const std::vector<float>& expected,
                 const char* what) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(got[i]) && std::isnan(expected[i])) continue;
    ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(expected[i]))
        << what << " lane " << i;
  }
}

TEST(Simd, ArithmeticComparesAndSelects) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    const size_t n = 1 + static_cast<size_t>(round) % 37;
    const auto count = static_cast<int64_t>(n);
    const std::vector<float> a = awkward(random, n);
    std::vector<float> b = awkward(random, n);
    const std::vector<float> c = awkward(random, n);
    for (size_t i = 0; i < n; i += 5) b[i] = a[i];
    std::vector<float> abs(n), fma(n), min(n), max(n), select(n);
    for (size_t i = 0; i < n; ++i) {
      abs[i] = std::fabs(a[i]);
      fma[i] = std::fma(a[i], b[i], c[i]);
      min[i] = a[i] < b[i] ? a[i] : b[i];
      max[i] = a[i] > b[i] ? a[i] : b[i];
      select[i] = a[i] < b[i] ? a[i] + b[i] : a[i] == b[i] ? a[i] * b[i] : a[i] - b[i];
    }
    for (const SimdProbe* probe : probes()) {
      SCOPED_TRACE(to_string(probe->isa));
      std::vector<float> y(n);
      probe->abs(a.data(), y.data(), count);
      expect_same(y, abs, "abs");
      probe->fma(a.data(), b.data(), c.data(), y.data(), count);
      expect_same(y, fma, "fma");
      probe->min(a.data(), b.data(), y.data(), count);
      expect_same(y, min, "min");
      probe->max(a.data(), b.data(), y.data(), count);
      expect_same(y, max, "max");
      probe->select(a.data(), b.data(), y.data(), count);
      expect_same(y, select, "select");
    }
    if (HasFatalFailure()) return;
  }
}

TEST(Simd, Ldexp) {
  std::vector<float> a;
  std::vector<float> e;
  for (int n = -250; n <= 250; ++n) {
    for (const float m : {0.5f, 0.50000006f, -0.75f, 1.0f, 1.1f, -1.9999999f}) {
      a.push_back(m);
      e.push_back(static_cast<float>(n));
    }
  }
  std::vector<float> y(a.size());
  for (const SimdProbe* probe : probes()) {
    probe->ldexp(a.data(), e.data(), y.data(), static_cast<int64_t>(a.size()));
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_EQ(y[i], std::ldexp(a[i], static_cast<int>(e[i]))) << a[i] << " 2^" << e[i];
    }
  }
}

TEST(Simd, Lookups) {
  std::mt19937 random(13);
  std::array<int32_t, 16> table;
  std::array<float, 16> values;
  for (int32_t& v : table) v = static_cast<int32_t>(random());
  for (float& v : values) v = static_cast<float>(random());
  std::vector<float> t;
  for (int k = -2000; k <= 2000; k += 3) t.push_back(0x1.8p23f + static_cast<float>(k));
  std::vector<float> y(t.size());
  for (const SimdProbe* probe : probes()) {
    probe->lookup_scaled(table.data(), t.data(), y.data(), static_cast<int64_t>(t.size()));
    for (size_t i = 0; i < t.size(); ++i) {
      const auto index = std::bit_cast<uint32_t>(t[i]);
      const uint32_t expected = static_cast<uint32_t>(table[index % 16]) + index * 0x80000;
      ASSERT_EQ(std::bit_cast<uint32_t>(y[i]), expected) << t[i];
    }
    probe->lookup(values.data(), t.data(), y.data(), static_cast<int64_t>(t.size()));
    for (size_t i = 0; i < t.size(); ++i) {
      ASSERT_EQ(y[i], values[std::bit_cast<uint32_t>(t[i]) % 16]) << t[i];
    }
  }
}

TEST(Simd, Integers) {
  std::mt19937 random(5);
  std::vector<int32_t> a(77), b(77), copy(77);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = static_cast<int32_t>(random());
    b[i] = i % 3 == 0 ? INT32_MAX : static_cast<int32_t>(random());
  }
  for (const SimdProbe* probe : probes()) {
    std::vector<float> y(77);
    probe->i32_copy(a.data(), copy.data(), 77);
    EXPECT_EQ(copy, a);
    probe->i32_sum_to_f32(a.data(), b.data(), y.data(), 77);
    for (size_t i = 0; i < y.size(); ++i) {
      const auto wrapped =
          static_cast<int32_t>(static_cast<uint32_t>(a[i]) + static_cast<uint32_t>(b[i]));
      ASSERT_EQ(y[i], static_cast<float>(wrapped));
    }
  }
}

TEST(Simd, Reductions) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const SimdProbe* probe : probes()) {
    const auto width = static_cast<size_t>(probe->width);
    for (size_t at = 0; at < width; ++at) {
      std::vector<float> x(2 * width), limit(width, 10.0f), even(width), odd(width);
      for (float& v : x) v = normal(random);
      x[at] = 9.0f;
      EXPECT_EQ(probe->reduce_max(x.data()), 9.0f);
      EXPECT_EQ(probe->any_all_less(x.data(), limit.data()), 3);
      x[at] = -9.0f;
      EXPECT_EQ(probe->reduce_min(x.data()), -9.0f);
      EXPECT_EQ(std::bit_cast<float>(probe->reduce_magnitude(x.data(), probe->width)), 9.0f);
      limit.assign(width, -8.0f);
      EXPECT_EQ(probe->any_all_less(x.data(), limit.data()), width == 1 ? 3 : 1);
      x[at] = NAN;
      EXPECT_GT(probe->reduce_magnitude(x.data(), probe->width), 0x7F800000);
      x[at] = -INFINITY;
      EXPECT_EQ(probe->reduce_magnitude(x.data(), probe->width), 0x7F800000);
      probe->deinterleave(x.data(), even.data(), odd.data());
      for (size_t i = 0; i < width; ++i) {
        EXPECT_EQ(even[i], x[2 * i]);
        EXPECT_EQ(odd[i], x[2 * i + 1]);
      }
    }
    std::vector<float> zeros(width, -0.0f);
    EXPECT_EQ(probe->reduce_magnitude(zeros.data(), probe->width), 0);
    EXPECT_EQ(probe->any_all_less(zeros.data(), zeros.data()), 0);
  }
}

// Every value comes back to its place, whatever the order on the way.
TEST(Simd, TwoVectorsAtATime) {
  std::mt19937 random(11);
  const auto check = [&](auto type, auto copy) {
    using T = decltype(type);
    alignas(64) static std::array<T, 65536> x;
    alignas(64) static std::array<T, 65536> y;
    for (size_t i = 0; i < x.size(); ++i) {
      if constexpr (sizeof(T) == 2) {
        x[i].bits = static_cast<uint16_t>(i);
      } else {
        x[i] = std::bit_cast<float>(static_cast<uint32_t>(random()));
      }
    }
    for (const bool stream : {false, true}) {
      std::memset(y.data(), 0, sizeof(y));
      copy(x.data(), y.data(), 65536, stream);
      for (size_t i = 0; i < x.size(); ++i) {
        if constexpr (sizeof(T) == 2) {
          const int quiet = !std::isnan(to_f32(x[i])) ? 0
                            : std::is_same_v<T, bf16> ? 0x0040
                                                      : 0x0200;
          ASSERT_EQ(y[i].bits | quiet, x[i].bits | quiet);
        } else {
          ASSERT_EQ(std::bit_cast<uint32_t>(y[i]), std::bit_cast<uint32_t>(x[i]));
        }
      }
    }
  };
  for (const SimdProbe* probe : probes()) {
    check(bf16{}, probe->copy_bf16);
    check(f16{}, probe->copy_f16);
    check(float{}, probe->copy_f32);
  }
}

TEST(Simd, StreamingStores) {
  alignas(64) std::array<bf16, 64> brain;
  alignas(64) std::array<float, 64> full;
  alignas(64) std::array<int8_t, 64> s8;
  std::vector<float> x(64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = 4 * static_cast<float>(i) - 127.5f;  // ties
  for (const SimdProbe* probe : probes()) {
    probe->stream_bf16(x.data(), brain.data(), 64);
    probe->stream_f32(x.data(), full.data(), 64);
    probe->stream_s8(x.data(), s8.data(), 64);
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(brain[i].bits, to_bf16(x[i]).bits);
      ASSERT_EQ(full[i], x[i]);
      ASSERT_EQ(s8[i], static_cast<int8_t>(std::nearbyint(x[i])));
    }
  }
}

TEST(Simd, MaxMagnitude) {
  std::mt19937 random(9);
  for (const SimdProbe* probe : probes()) {
    for (int64_t n = 0; n <= 100; ++n) {
      const auto count = static_cast<size_t>(n);
      const GuardedBuffer values(2 * count, GuardedBuffer::Against::kBack);
      const auto check = [&](auto type, auto function, uint16_t infinity) {
        auto* p = values.as<decltype(type)>();
        float expected = 0;
        for (size_t i = 0; i < count; ++i) {
          p[i].bits = static_cast<uint16_t>((random() & 0x8000) | random() % infinity);
          expected = std::fmax(expected, std::fabs(to_f32(p[i])));
        }
        ASSERT_EQ(function(p, n), expected) << n;
        if (n == 0) return;
        p[random() % count].bits = infinity;
        ASSERT_EQ(function(p, n), INFINITY) << n;
        p[random() % count].bits = static_cast<uint16_t>(0x8001 + infinity);
        ASSERT_TRUE(std::isnan(function(p, n))) << n;
      };
      check(bf16{}, probe->max_magnitude_bf16, 0x7F80);
      check(f16{}, probe->max_magnitude_f16, 0x7C00);
    }
  }
}

// Every tail length, right up against a page that may not be touched, on either side; and what
// lies behind a tail on the other side stays as it is.
TEST(Simd, TailsTouchNothingElse) {
  std::vector<float> values(64);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i) + 0.25f;
  for (const SimdProbe* probe : probes()) {
    for (int64_t n = 0; n <= 40; ++n) {
      for (const auto side : {GuardedBuffer::Against::kFront, GuardedBuffer::Against::kBack}) {
        const auto count = static_cast<size_t>(n);
        const auto run = [&](auto from_type, auto to_type, auto function) {
          using From = decltype(from_type);
          using To = decltype(to_type);
          const GuardedBuffer in(count * sizeof(From), side);
          const GuardedBuffer out(count * sizeof(To), side);
          function(in.as<From>(), out.as<To>(), n);
          if (side == GuardedBuffer::Against::kFront) {  // the rest of the page follows
            for (size_t i = 0; i < 64 && n > 0; ++i) {
              ASSERT_EQ(reinterpret_cast<char*>(out.as<To>() + n)[i], 0) << "n " << n;
            }
          }
        };
        run(float{}, float{}, probe->exp);
        run(bf16{}, float{}, probe->bf16_to_f32);
        run(f16{}, float{}, probe->f16_to_f32);
        run(float{}, bf16{}, probe->f32_to_bf16);
        run(float{}, f16{}, probe->f32_to_f16);
        run(float{}, int8_t{}, probe->f32_to_s8);
        run(float{}, uint8_t{}, probe->f32_to_u8);
        run(int32_t{}, int32_t{}, probe->i32_copy);
      }
    }
  }
}

}  // namespace
}  // namespace moeops

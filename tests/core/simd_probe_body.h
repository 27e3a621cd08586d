// SPDX-License-Identifier: Apache-2.0
#pragma once

// The probe's functions, for the one simd_<isa>.h that was included before.

#include "ops/core/simd_math.h"
#include "tests/core/simd_probe.h"

namespace moeops::test {
namespace {

// The tail's length is never 0: kernels may pass that too, so the loop ends with an empty one.
template <auto Function, class From, class To>
void map(const From* x, To* y, int64_t n) {
  int64_t i = 0;
  for (; i + simd::kWidth <= n; i += simd::kWidth) simd::store(y + i, Function(simd::load(x + i)));
  simd::store(y + i, Function(simd::load(x + i, n - i)), n - i);
}

template <auto Function, class From>
void map2(const From* a, const From* b, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + simd::kWidth <= n; i += simd::kWidth) {
    simd::store(y + i, Function(simd::load(a + i), simd::load(b + i)));
  }
  const int64_t tail = n - i;
  simd::store(y + i, Function(simd::load(a + i, tail), simd::load(b + i, tail)), tail);
}

template <class To>
void stream(const float* x, To* y, int64_t n) {
  for (int64_t i = 0; i < n; i += simd::kWidth) simd::stream(y + i, simd::load(x + i));
  simd::stream_fence();
}

void stream_s8(const float* x, int8_t* y, int64_t n) {
  constexpr int kW = simd::kWidth;
  for (int64_t i = 0; i < n; i += 4 * kW) {
    simd::stream(y + i, simd::load(x + i), simd::load(x + i + kW), simd::load(x + i + 2 * kW),
                 simd::load(x + i + 3 * kW));
  }
  simd::stream_fence();
}

void narrow_by_twos(const float* x, bf16* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * simd::kWidth) {
    simd::Vec even;
    simd::Vec odd;
    simd::deinterleave(simd::load(x + i), simd::load(x + i + simd::kWidth), &even, &odd);
    simd::store_two(y + i, even, odd);
  }
}

template <class T>
void copy_by_twos(const T* x, T* y, int64_t n, bool stream) {
  for (int64_t i = 0; i < n; i += 2 * simd::kWidth) {
    simd::Vec a;
    simd::Vec b;
    simd::load_two(x + i, &a, &b);
    if (stream) {
      simd::stream_two(y + i, a, b);
    } else {
      simd::store_two(y + i, a, b);
    }
  }
  simd::stream_fence();
}

template <auto Lookup, class T>
void lookup(const T* table, const float* t, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += simd::kWidth) {
    const int64_t m = n - i < simd::kWidth ? n - i : simd::kWidth;
    simd::store(y + i, Lookup(table, simd::load(t + i, m)), m);
  }
}
simd::Vec lookup_float(const float* table, simd::Vec t) { return simd::lookup(table, t); }

simd::Vec same(simd::Vec x) { return x; }
simd::VecI same_i32(simd::VecI x) { return x; }
simd::Vec absolute(simd::Vec x) { return simd::abs(x); }
simd::Vec minimum(simd::Vec a, simd::Vec b) { return simd::min(a, b); }
simd::Vec maximum(simd::Vec a, simd::Vec b) { return simd::max(a, b); }
simd::Vec sum(simd::VecI a, simd::VecI b) { return simd::to_f32(a + b); }
simd::Vec choose(simd::Vec a, simd::Vec b) {
  const simd::Vec other = simd::select((a <= b) & (a >= b), a * b, a - b);
  return simd::select(a < b, a + b, other);
}

void fma3(const float* a, const float* b, const float* c, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += simd::kWidth) {
    const int64_t m = n - i < simd::kWidth ? n - i : simd::kWidth;
    simd::store(y + i, simd::fma(simd::load(a + i, m), simd::load(b + i, m), simd::load(c + i, m)),
                m);
  }
}

void split(const float* x, float* even, float* odd) {
  simd::Vec e;
  simd::Vec o;
  simd::deinterleave(simd::load(x), simd::load(x + simd::kWidth), &e, &o);
  simd::store(even, e);
  simd::store(odd, o);
}

float largest(const float* x) { return simd::reduce_max(simd::load(x)); }
float smallest(const float* x) { return simd::reduce_min(simd::load(x)); }
int32_t magnitude(const float* x, int64_t n) {
  simd::VecI bits = simd::broadcast(int32_t{0});
  for (int64_t i = 0; i < n; i += simd::kWidth) {
    const int64_t m = n - i < simd::kWidth ? n - i : simd::kWidth;
    bits = simd::max(bits, simd::magnitude_bits(simd::load(x + i, m)));
  }
  return simd::reduce_max(bits);
}
int any_all(const float* a, const float* b) {
  const simd::Mask less = simd::load(a) < simd::load(b);
  return (simd::any(less) ? 1 : 0) + (simd::all(less) ? 2 : 0);
}

constexpr SimdProbe make_probe(Isa isa) {
  return {isa,
          simd::kWidth,
          map<simd::exp, float, float>,
          map<simd::sigmoid, float, float>,
          map<simd::silu, float, float>,
          map<simd::gelu_tanh, float, float>,
          map<absolute, float, float>,
          fma3,
          map2<minimum, float>,
          map2<maximum, float>,
          map2<choose, float>,
          map2<simd::ldexp, float>,
          lookup<lookup_float, float>,
          lookup<simd::lookup_scaled, int32_t>,
          map<same, bf16, float>,
          map<same, f16, float>,
          map<same, float, bf16>,
          narrow_by_twos,
          map<same, float, f16>,
          map<same, float, int8_t>,
          map<same, float, uint8_t>,
          map2<sum, int32_t>,
          map<same_i32, int32_t, int32_t>,
          stream<bf16>,
          stream<float>,
          stream_s8,
          copy_by_twos<bf16>,
          copy_by_twos<f16>,
          copy_by_twos<float>,
          simd::max_magnitude<bf16>,
          simd::max_magnitude<f16>,
          split,
          largest,
          smallest,
          magnitude,
          any_all};
}

}  // namespace
}  // namespace moeops::test

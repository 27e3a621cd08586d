// SPDX-License-Identifier: Apache-2.0
#pragma once

// The row kernels, for the one simd_<isa>.h that was included before.

#include <type_traits>

#include "ops/swiglu/gated.h"
#include "ops/swiglu/kernels.h"

namespace moeops::swiglu_internal {
namespace {

using simd::kWidth;
using simd::Vec;

// The columns of a row of x, by vectors.
template <class X>
struct Columns {
  static constexpr bool kStreams = true;
  const X* x;

  Vec at(int64_t j) const { return simd::load(x + j); }
  void at(int64_t j, Vec* a, Vec* b) const { simd::load_two(x + j, a, b); }
  Vec at(int64_t j, int64_t count) const { return simd::load(x + j, count); }
};

// (x + bias_i32) * weight_scale * x_scale + bias_f32.
template <bool BiasI32, bool BiasF32>
struct Dequantised {
  static constexpr bool kStreams = false;  // the row is quantised next
  const DequantRow row;
  const Vec x_scale = simd::broadcast(row.x_scale);

  Vec at(int64_t j) const {
    simd::VecI sum = simd::load(row.x + j);
    if constexpr (BiasI32) sum = sum + simd::load(row.bias_i32 + j);
    const Vec v = simd::to_f32(sum) * simd::load(row.weight_scale + j) * x_scale;
    if constexpr (BiasF32) return v + simd::load(row.bias_f32 + j);
    return v;
  }
  void at(int64_t j, Vec* a, Vec* b) const {
    *a = at(j);
    *b = at(j + kWidth);
  }
  Vec at(int64_t j, int64_t count) const {
    simd::VecI sum = simd::load(row.x + j, count);
    if constexpr (BiasI32) sum = sum + simd::load(row.bias_i32 + j, count);
    const Vec v = simd::to_f32(sum) * simd::load(row.weight_scale + j, count) * x_scale;
    if constexpr (BiasF32) return v + simd::load(row.bias_f32 + j, count);
    return v;
  }
};

// g and u of the elements from j on, for each way in which they lie in a row; two vectors of them
// in the order in which its store and stream take two results.
struct Apart {
  int64_t g;  // where each begins
  int64_t u;

  template <class Source>
  void load(const Source& source, int64_t j, Vec* gate, Vec* up) const {
    *gate = source.at(g + j);
    *up = source.at(u + j);
  }
  template <class Source>
  void load_two(const Source& source, int64_t j, Vec* gate, Vec* up) const {
    source.at(g + j, gate, gate + 1);
    source.at(u + j, up, up + 1);
  }
  template <class Y>
  void store(Y* y, Vec a, Vec b) const {
    simd::store_two(y, a, b);
  }
  template <class Y>
  void stream(Y* y, Vec a, Vec b) const {
    simd::stream_two(y, a, b);
  }
  template <class Source>
  void load(const Source& source, int64_t j, int64_t count, Vec* gate, Vec* up) const {
    *gate = source.at(g + j, count);
    *up = source.at(u + j, count);
  }
};
struct Interleaved {
  template <class Source>
  void load(const Source& source, int64_t j, Vec* gate, Vec* up) const {
    if constexpr (std::is_same_v<Source, Columns<bf16>>) return source.at(2 * j, gate, up);
    simd::deinterleave(source.at(2 * j), source.at(2 * j + kWidth), gate, up);
  }
  template <class Source>
  void load_two(const Source& source, int64_t j, Vec* gate, Vec* up) const {
    load(source, j, gate, up);
    load(source, j + kWidth, gate + 1, up + 1);
  }
  template <class Y>
  void store(Y* y, Vec a, Vec b) const {
    simd::store(y, a);
    simd::store(y + kWidth, b);
  }
  template <class Y>
  void stream(Y* y, Vec a, Vec b) const {
    simd::stream(y, a);
    simd::stream(y + kWidth, b);
  }
  template <class Source>
  void load(const Source& source, int64_t j, int64_t count, Vec* gate, Vec* up) const {
    const int64_t values = 2 * count;
    const Vec none = simd::broadcast(0.0f);
    const Vec first = values < kWidth ? source.at(2 * j, values) : source.at(2 * j);
    const Vec second = values <= kWidth ? none : source.at(2 * j + kWidth, values - kWidth);
    simd::deinterleave(first, second, gate, up);
  }
};

template <GatedActivation A, class Source, class Layout>
inline Vec value(const SwigluParams& params, const Source& source, const Layout& layout,
                 int64_t j) {
  Vec g;
  Vec u;
  layout.load(source, j, &g, &u);
  return gated_as<A>(params, g, u);
}
template <GatedActivation A, class Source, class Layout>
[[gnu::always_inline]] inline void two_values(const SwigluParams& params, const Source& source,
                                              const Layout& layout, int64_t j, Vec* y) {
  Vec g[2];
  Vec u[2];
  layout.load_two(source, j, g, u);
  y[0] = gated_as<A>(params, g[0], u[0]);
  y[1] = gated_as<A>(params, g[1], u[1]);
}

template <GatedActivation A, class Source, class Layout, class Y>
inline void run_part(const SwigluParams& params, const Source& source, const Layout& layout,
                     int64_t j, int64_t count, Y* y) {
  Vec g;
  Vec u;
  layout.load(source, j, count, &g, &u);
  simd::store(y + j, gated_as<A>(params, g, u), count);
}

// By value, so that writing y is known to change none of them.
template <GatedActivation A, class Source, class Layout, class Y>
inline void run(const SwigluParams params, const Source source, const Layout layout, int64_t I,
                Y* y, const void* next) {
  constexpr int kTwo = 2 * kWidth;
  int64_t j = 0;
  if (next != nullptr) {
    // A line at a time: one that waits half written for its other half may be evicted as it is,
    // and a partial write costs memory several times a whole one.
    constexpr int kLine = 64 / static_cast<int>(sizeof(Y));
    constexpr int kBlock = kLine < kTwo ? kTwo : kLine;
    int64_t head = 0;
    if constexpr (Source::kStreams) {
      const auto unaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(y) % 64) /
                             static_cast<int64_t>(sizeof(Y));
      head = unaligned < I ? unaligned : I;
    }
    for (; j < head; j += kWidth) {
      run_part<A>(params, source, layout, j, head - j < kWidth ? head - j : kWidth, y);
    }
    for (j = head; j + kBlock <= I; j += kBlock) {
      Vec block[kBlock / kWidth];
      for (int k = 0; k < kBlock; k += kTwo) {
        two_values<A>(params, source, layout, j + k, block + k / kWidth);
      }
      for (int k = 0; k < kBlock; k += kTwo) {
        if constexpr (Source::kStreams) {
          layout.stream(y + j + k, block[k / kWidth], block[k / kWidth + 1]);
        } else {
          layout.store(y + j + k, block[k / kWidth], block[k / kWidth + 1]);
        }
      }
      // x is twice as wide as y.
      const char* ahead = static_cast<const char*>(next) + 2 * j * static_cast<int64_t>(sizeof(Y));
      for (int k = 0; k < 2 * kBlock; k += kLine) {
        __builtin_prefetch(ahead + k * static_cast<int>(sizeof(Y)), 0, 2);
      }
    }
  }
  for (; j + kTwo <= I; j += kTwo) {
    Vec two[2];
    two_values<A>(params, source, layout, j, two);
    layout.store(y + j, two[0], two[1]);
  }
  for (; j + kWidth <= I; j += kWidth) simd::store(y + j, value<A>(params, source, layout, j));
  if (j < I) run_part<A>(params, source, layout, j, I - j, y);
}

template <class Source, class Layout, class Y>
inline void run(const SwigluParams& params, const Source& source, const Layout& layout, int64_t I,
                Y* y, const void* next) {
  switch (params.activation) {
    case GatedActivation::kSilu:
      return run<GatedActivation::kSilu>(params, source, layout, I, y, next);
    case GatedActivation::kSwigluOai:
      return run<GatedActivation::kSwigluOai>(params, source, layout, I, y, next);
    case GatedActivation::kGeluTanh:
      return run<GatedActivation::kGeluTanh>(params, source, layout, I, y, next);
  }
}

template <class Source, class Y>
inline void run(const SwigluParams& params, const Source& source, int64_t I, Y* y,
                const void* next) {
  switch (params.gate) {
    case Gate::kLeft:
      return run(params, source, Apart{0, I}, I, y, next);
    case Gate::kRight:
      return run(params, source, Apart{I, 0}, I, y, next);
    case Gate::kInterleaved:
      return run(params, source, Interleaved(), I, y, next);
  }
}

template <class T>
void swiglu_row(const SwigluParams& params, const void* x, int64_t I, void* y, const void* next) {
  SwigluParams plain = params;
  // No other NaN than those of x and the processor's own: store_two asks for it.
  if (plain.alpha != plain.alpha) plain.alpha = __builtin_nanf("");
  run(plain, Columns<T>{static_cast<const T*>(x)}, I, static_cast<T*>(y), next);
}

void dequant(const SwigluParams& params, const DequantRow& row, int64_t I, float* h,
             const void* next) {
  if (row.bias_i32 != nullptr) {
    run(params, Dequantised<true, false>{row}, I, h, next);
  } else if (row.bias_f32 != nullptr) {
    run(params, Dequantised<false, true>{row}, I, h, next);
  } else {
    run(params, Dequantised<false, false>{row}, I, h, next);
  }
}

constexpr RowKernels make_kernels(Isa isa) {
  return {isa, swiglu_row<float>, swiglu_row<bf16>, swiglu_row<f16>, dequant, simd::stream_fence};
}

}  // namespace
}  // namespace moeops::swiglu_internal

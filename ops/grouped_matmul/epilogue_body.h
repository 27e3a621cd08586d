// SPDX-License-Identifier: Apache-2.0
#pragma once

// The epilogue over the vector layer: include one simd_<isa>.h first.

#include "ops/core/simd_math.h"
#include "ops/grouped_matmul/epilogue.h"
#include "ops/swiglu/gated.h"

namespace moeops::grouped_matmul_internal {
namespace {

// kPanelColumns is PackedWeights', but this file is to include nothing that could be emitted weak.
inline constexpr int kRow = 64;
static_assert(kRow % simd::kWidth == 0);

// What a column's sums of (x + 128) * w must change by.
struct Corrections {
  alignas(64) int32_t of_column[kRow];

  Corrections(int width, const ColumnConstants& columns) {
    for (int j = 0; j < width; ++j) {
      const uint32_t bias =
          columns.bias_i32 != nullptr ? static_cast<uint32_t>(columns.bias_i32[j]) : 0u;
      of_column[j] = static_cast<int32_t>(bias - 128u * static_cast<uint32_t>(columns.sums[j]));
    }
  }
};

// Modulo 2^32. On scalar registers + is the language's, which must not overflow.
template <class V>
V wrapping_sum(V a, V b) {
  if constexpr (simd::kWidth == 1) {
    return static_cast<V>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  } else {
    return a + b;
  }
}

void to_exact(int32_t* c, int rows, int width, const ColumnConstants& columns) {
  const Corrections corrections(width, columns);
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < width; j += simd::kWidth) {
      int32_t* at = c + r * kRow + j;
      simd::store(at, wrapping_sum(simd::load(at), simd::load(corrections.of_column + j)));
    }
  }
}

void to_values(void* c, int rows, int width, const ColumnConstants& columns, const float* x_scale) {
  auto* values = static_cast<float*>(c);
  if (columns.sums == nullptr) {
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < width; j += simd::kWidth) {
        float* at = values + r * kRow + j;
        simd::store(at, simd::load(at) + simd::load(columns.bias + j));
      }
    }
    return;
  }
  const auto* sums = static_cast<const int32_t*>(c);
  const Corrections corrections(width, columns);
  for (int j = 0; j < width; j += simd::kWidth) {
    const simd::VecI correction = simd::load(corrections.of_column + j);
    const simd::Vec scale = simd::load(columns.scale + j);
    for (int r = 0; r < rows; ++r) {
      const int at = r * kRow + j;
      simd::Vec v = simd::to_f32(wrapping_sum(simd::load(sums + at), correction)) * scale;
      if (x_scale != nullptr) v = v * simd::broadcast(x_scale[r]);
      if (columns.bias != nullptr) v = v + simd::load(columns.bias + j);
      simd::store(values + at, v);
    }
  }
}

template <class Function>
void for_each_vector(float* c, int rows, int width, Function function) {
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < width; j += simd::kWidth) {
      float* at = c + r * kRow + j;
      simd::store(at, function(simd::load(at)));
    }
  }
}

void activate(float* c, int rows, int width, Activation activation) {
  using simd::Vec;
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu: {
      const Vec zero = simd::broadcast(0.0f);
      // NaN stays.
      return for_each_vector(c, rows, width,
                             [&](Vec v) { return simd::select(v < zero, zero, v); });
    }
    case Activation::kGeluTanh:
      return for_each_vector(c, rows, width, [](Vec v) { return simd::gelu_tanh(v); });
    case Activation::kSilu:
      return for_each_vector(c, rows, width, [](Vec v) { return simd::silu(v); });
  }
}

template <class T>
void store_row(T* to, int columns, const float* from, simd::Vec offset, bool has_offset,
               bool streams) {
  constexpr int kBytes = simd::kWidth * static_cast<int>(sizeof(T));
  int j = 0;
  if constexpr (sizeof(T) > 1) {  // bytes come in halves of the vectors that can be streamed
    if (streams && reinterpret_cast<uintptr_t>(to) % kBytes == 0) {
      for (; j + simd::kWidth <= columns; j += simd::kWidth) {
        simd::stream(to + j, simd::load(from + j));
      }
    }
  }
  for (; j + simd::kWidth <= columns; j += simd::kWidth) {
    const simd::Vec v = simd::load(from + j);
    simd::store(to + j, has_offset ? v + offset : v);
  }
  if (j < columns) {
    const simd::Vec v = simd::load(from + j);
    simd::store(to + j, has_offset ? v + offset : v, columns - j);
  }
}

void store(const float* c, int rows, int columns, float offset, char* y, int64_t y_stride,
           DType y_dtype, bool streams) {
  const simd::Vec shift = simd::broadcast(offset);
  for (int r = 0; r < rows; ++r, c += kRow, y += y_stride) {
    switch (y_dtype) {
      case DType::kF32:
        store_row(reinterpret_cast<float*>(y), columns, c, shift, false, streams);
        break;
      case DType::kBf16:
        store_row(reinterpret_cast<bf16*>(y), columns, c, shift, false, streams);
        break;
      case DType::kF16:
        store_row(reinterpret_cast<f16*>(y), columns, c, shift, false, streams);
        break;
      default:
        store_row(reinterpret_cast<int8_t*>(y), columns, c, shift, true, streams);
        break;
    }
  }
}

void fence() { simd::stream_fence(); }

template <class T>
void gate_up_row(const float* c, int half, int columns, const SwigluParams& params, T* h) {
  for (int j = 0; j < columns; j += simd::kWidth) {
    const simd::Vec v = swiglu_internal::gated(params, simd::load(c + j), simd::load(c + half + j));
    if (j + simd::kWidth <= columns) {
      simd::store(h + j, v);
    } else {
      simd::store(h + j, v, columns - j);
    }
  }
}

void gate_up(const float* c, int rows, int width, int columns, const SwigluParams& params, char* h,
             int64_t h_stride, DType h_dtype) {
  for (int r = 0; r < rows; ++r, c += kRow, h += h_stride) {
    if (h_dtype == DType::kF32) {
      gate_up_row(c, width / 2, columns, params, reinterpret_cast<float*>(h));
    } else {
      gate_up_row(c, width / 2, columns, params, reinterpret_cast<bf16*>(h));
    }
  }
}

constexpr EpilogueKernels kernels_for(Isa isa) {
  return {isa, to_exact, to_values, activate, store, fence, gate_up};
}

}  // namespace
}  // namespace moeops::grouped_matmul_internal

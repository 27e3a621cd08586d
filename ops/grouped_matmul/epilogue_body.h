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

// The values of a tile, a vector at a time: f32 sums, or s32 ones times their scales; plus the
// bias.
template <bool kS32, bool kBias>
class Values {
 public:
  Values(const void* c, const ColumnConstants& columns, const int32_t* corrections,
         const float* x_scale)
      : c_(c), columns_(columns), corrections_(corrections), x_scale_(x_scale) {}

  // What a row multiplies; a product with 1 is the same number.
  simd::Vec row_scale(int r) const {
    return simd::broadcast(kS32 && x_scale_ != nullptr ? x_scale_[r] : 1.0f);
  }
  simd::Vec at(int r, int j, simd::Vec row_scale) const {
    simd::Vec v;
    if constexpr (kS32) {
      const auto* sums = static_cast<const int32_t*>(c_) + r * kRow;
      v = simd::to_f32(wrapping_sum(simd::load(sums + j), simd::load(corrections_ + j)));
      v = v * simd::load(columns_.scale + j) * row_scale;
    } else {
      v = simd::load(static_cast<const float*>(c_) + r * kRow + j);
    }
    if constexpr (kBias) v = v + simd::load(columns_.bias + j);
    return v;
  }

 private:
  const void* c_;
  const ColumnConstants& columns_;
  const int32_t* corrections_;
  const float* x_scale_;
};

// Calls function(values of the tile).
template <class Function>
void with_values(const void* c, int width, const ColumnConstants& columns, const float* x_scale,
                 const Function& function) {
  if (columns.sums != nullptr) {
    const Corrections corrections(width, columns);
    const int32_t* of_column = corrections.of_column;
    if (columns.bias != nullptr) {
      function(Values<true, true>(c, columns, of_column, x_scale));
    } else {
      function(Values<true, false>(c, columns, of_column, x_scale));
    }
  } else if (columns.bias != nullptr) {
    function(Values<false, true>(c, columns, nullptr, nullptr));
  } else {
    function(Values<false, false>(c, columns, nullptr, nullptr));
  }
}

void to_values(void* c, int rows, int width, const ColumnConstants& columns, const float* x_scale) {
  with_values(c, width, columns, x_scale, [&](const auto& values) {
    for (int r = 0; r < rows; ++r) {
      const simd::Vec row_scale = values.row_scale(r);
      for (int j = 0; j < width; j += simd::kWidth) {
        simd::store(static_cast<float*>(c) + r * kRow + j, values.at(r, j, row_scale));
      }
    }
  });
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

template <class T, class Values>
void store_row(const Values& values, int r, int columns, float offset, bool streams, T* to) {
  const simd::Vec row_scale = values.row_scale(r);
  const auto value = [&](int j) {
    const simd::Vec v = values.at(r, j, row_scale);
    if constexpr (sizeof(T) == 1) return v + simd::broadcast(offset);
    return v;
  };
  constexpr int kBytes = simd::kWidth * static_cast<int>(sizeof(T));
  int j = 0;
  if constexpr (sizeof(T) > 1) {  // bytes come in halves of the vectors that can be streamed
    if (streams && reinterpret_cast<uintptr_t>(to) % kBytes == 0) {
      for (; j + simd::kWidth <= columns; j += simd::kWidth) simd::stream(to + j, value(j));
    }
  }
  for (; j + simd::kWidth <= columns; j += simd::kWidth) simd::store(to + j, value(j));
  if (j < columns) simd::store(to + j, value(j), columns - j);
}

void store(const void* c, int rows, int columns, const ColumnConstants& constants,
           const float* x_scale, const Output& output) {
  const int whole = (columns + simd::kWidth - 1) / simd::kWidth * simd::kWidth;
  with_values(c, whole, constants, x_scale, [&](const auto& values) {
    char* y = output.y;
    for (int r = 0; r < rows; ++r, y += output.stride) {
      const auto to = [&](auto* row) {
        store_row(values, r, columns, output.offset, output.streams, row);
      };
      switch (output.dtype) {
        case DType::kF32:
          to(reinterpret_cast<float*>(y));
          break;
        case DType::kBf16:
          to(reinterpret_cast<bf16*>(y));
          break;
        case DType::kF16:
          to(reinterpret_cast<f16*>(y));
          break;
        default:
          to(reinterpret_cast<int8_t*>(y));
          break;
      }
    }
  });
}

void fence() { simd::stream_fence(); }

template <GatedActivation A, class T, class Values>
void gate_up_row(const Values& values, int r, int half, int columns, const SwigluParams& params,
                 T* h) {
  const simd::Vec row_scale = values.row_scale(r);
  // The next panel's place, which would be waited for line by line, out of memory, when it is
  // written.
  const auto next = reinterpret_cast<uintptr_t>(h) + static_cast<uintptr_t>(half) * sizeof(T);
  for (uintptr_t at = next; at < next + static_cast<uintptr_t>(half) * sizeof(T); at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 1, 3);
  }
  for (int j = 0; j < columns; j += simd::kWidth) {
    const simd::Vec v = swiglu_internal::gated_as<A>(params, values.at(r, j, row_scale),
                                                     values.at(r, half + j, row_scale));
    if (j + simd::kWidth <= columns) {
      simd::store(h + j, v);
    } else {
      simd::store(h + j, v, columns - j);
    }
  }
}

template <GatedActivation A>
void gate_up_as(const void* c, int rows, int width, int columns, const ColumnConstants& constants,
                const float* x_scale, const SwigluParams& params, char* h, int64_t h_stride,
                DType h_dtype) {
  with_values(c, width, constants, x_scale, [&](const auto& values) {
    for (int r = 0; r < rows; ++r, h += h_stride) {
      if (h_dtype == DType::kF32) {
        gate_up_row<A>(values, r, width / 2, columns, params, reinterpret_cast<float*>(h));
      } else {
        gate_up_row<A>(values, r, width / 2, columns, params, reinterpret_cast<bf16*>(h));
      }
    }
  });
}

void gate_up(const void* c, int rows, int width, int columns, const ColumnConstants& constants,
             const float* x_scale, const SwigluParams& params, char* h, int64_t h_stride,
             DType h_dtype) {
  const auto of = [&]() {
    switch (params.activation) {
      case GatedActivation::kSilu:
        return gate_up_as<GatedActivation::kSilu>;
      case GatedActivation::kGeluTanh:
        return gate_up_as<GatedActivation::kGeluTanh>;
      default:
        return gate_up_as<GatedActivation::kSwigluOai>;
    }
  };
  of()(c, rows, width, columns, constants, x_scale, params, h, h_stride, h_dtype);
}

constexpr EpilogueKernels kernels_for(Isa isa) {
  return {isa, to_exact, to_values, activate, store, fence, gate_up};
}

}  // namespace
}  // namespace moeops::grouped_matmul_internal

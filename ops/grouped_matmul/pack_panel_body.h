// SPDX-License-Identifier: Apache-2.0
#pragma once

// The body of every panel packer, compiled once for each ISA. All of it has internal linkage.

#include <cstdint>
#include <cstring>

#include "ops/grouped_matmul/pack_panel.h"

namespace moeops::grouped_matmul_internal {

namespace {

constexpr int kColumns = PackedWeights::kPanelColumns;
constexpr int kChunk = PackedWeights::kChunkBytes;
constexpr int kStrip = 16;         // columns whose 4-byte groups fill a cache line
constexpr int kRowsAhead = 24;     // far-apart rows that are asked for ahead of their turn
constexpr int kStageBytes = 1024;  // of a channel: a strip's 16 KiB stay in L1 beside its source

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float load_f32(float x) { return x; }
inline float load_f32(bf16 x) { return float_of(uint32_t{x.bits} << 16); }
// The branch-free twins of moeops::to_f32 and moeops::to_bf16: loops of them become vectors, which
// GCC denies to a choice between two values that take floating-point arithmetic.
inline uint32_t all_ones_if(bool condition) { return 0u - static_cast<uint32_t>(condition); }
inline float load_f32(f16 x) {
  const uint32_t m = x.bits & 0x7FFFu;
  const uint32_t quiet = all_ones_if(m > 0x7C00u) & 0x00400000u;
  const uint32_t rebias = all_ones_if(m >= 0x7C00u) & ((255u - 31u - (127u - 15u)) << 23);
  const uint32_t normal = ((m << 13) + ((127u - 15u) << 23) + rebias) | quiet;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(m)) * 0x1p-24f);
  const uint32_t is_subnormal = all_ones_if(m < 0x0400u);
  const uint32_t magnitude = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  return float_of(magnitude | (uint32_t{x.bits & 0x8000u} << 16));
}

inline uint16_t round_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x0040u;
  return static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

// clamp(rint(w * inverse), -127, 127), NaN to 0.
inline int8_t quantise(float w, float inverse) {
  float v = w * inverse;
  v = v > 127.0f ? 127.0f : v;
  v = v < -127.0f ? -127.0f : v;
  v = v == v ? v : 0.0f;
  // 1.5 * 2^23: the unit of the sum is 1, so the addition rounds to integers, half to even.
  return static_cast<int8_t>(bits_of(v + 12582912.0f) - 0x4B400000u);
}

// |x| of finite, infinite and NaN x in ascending order.
inline int32_t magnitude(float x) { return static_cast<int32_t>(bits_of(x) & 0x7FFFFFFFu); }

// scale and 127 / max of a channel with this largest magnitude.
inline void scale_of(int32_t largest, float* scale, float* inverse) {
  const float max = float_of(static_cast<uint32_t>(largest));
  const bool finite = largest < 0x7F800000;
  *scale = finite ? max / 127.0f : __builtin_nanf("");
  *inverse = finite && largest > 0 ? 127.0f / max : 0.0f;
}

template <class From>
int32_t largest_magnitude(const From* w, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t m = magnitude(load_f32(w[i]));
    largest = m > largest ? m : largest;
  }
  return largest;
}

// `inverse` is 127 / max for each element, or for all of them with Step 0; only read to quantise.
template <int Step, class From, class To>
inline void convert(const From* from, int64_t count, const float* inverse, To* to) {
  if constexpr (__is_same(From, To)) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(To));
  } else if constexpr (__is_same(To, float)) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_f32(from[i]);
  } else if constexpr (__is_same(To, bf16)) {
    for (int64_t i = 0; i < count; ++i) to[i].bits = round_to_bf16(load_f32(from[i]));
  } else {
    if constexpr (Step == 0) {
      const float all = *inverse;
      for (int64_t i = 0; i < count; ++i) to[i] = quantise(load_f32(from[i]), all);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = quantise(load_f32(from[i]), inverse[i]);
    }
  }
}

template <class T>
inline constexpr bool kIsS8 = __is_same(T, int8_t);

typedef uint32_t Quad __attribute__((vector_size(16)));

inline Quad load_quad(const char* p) {
  Quad q;
  __builtin_memcpy(&q, p, sizeof(q));
  return q;
}
inline void store_quad(char* p, Quad q) { __builtin_memcpy(p, &q, sizeof(q)); }

// Four rows of 16 bytes, `from_stride` apart, to the four columns of 4 bytes.
inline void transpose_quads(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
  const Quad a = load_quad(from), b = load_quad(from + from_stride);
  const Quad c = load_quad(from + 2 * from_stride), d = load_quad(from + 3 * from_stride);
  const Quad ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Quad ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Quad cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store_quad(to, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
  store_quad(to + to_stride, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
  store_quad(to + 2 * to_stride, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
  store_quad(to + 3 * to_stride, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
}

struct Channel {
  const PanelSource::Matrix* matrix;  // null: the column has none
  int64_t index;
};

inline Channel channel_of(const PanelSource& source, int column) {
  for (size_t r = 0; r < source.runs.size(); ++r) {
    const PackedWeights::ChannelRun& run = source.runs[r];
    if (column >= run.column && column < run.column + run.count) {
      return {&source.matrices[r], run.channel + (column - run.column) * run.step};
    }
  }
  return {nullptr, 0};
}

inline float given_scale(const Channel& channel) {
  if (channel.matrix == nullptr || channel.matrix->scales == nullptr) return 0.0f;
  return channel.matrix->scales[channel.index * channel.matrix->scale_step];
}

// Rows of the source are channels: 16 of them at a time, each converted into a row of the stage,
// are transposed in groups of 4 bytes.
template <class From, class To>
void pack_channel_rows(const PanelSource& source, const Panel& panel) {
  constexpr int64_t kStageElements = kStageBytes / static_cast<int64_t>(sizeof(To));
  constexpr int64_t kChunkElements = kChunk / static_cast<int64_t>(sizeof(To));
  alignas(64) char stage[kStrip][kStageBytes];
  const int64_t row_bytes = int64_t{panel.width} * 4;
  for (int strip = 0; strip < panel.width; strip += kStrip) {
    const From* rows[kStrip];
    float inverse[kStrip];
    int32_t sums[kStrip] = {};
    for (int i = 0; i < kStrip; ++i) {
      const Channel channel = channel_of(source, strip + i);
      rows[i] = channel.matrix == nullptr ? nullptr
                                          : static_cast<const From*>(channel.matrix->w) +
                                                channel.index * channel.matrix->row_stride;
      if constexpr (kIsS8<To>) {
        float scale = 0.0f;
        inverse[i] = 0.0f;
        if constexpr (kIsS8<From>) {
          scale = given_scale(channel);
        } else if (rows[i] != nullptr) {
          scale_of(largest_magnitude(rows[i], source.k), &scale, &inverse[i]);
        }
        panel.scales[strip + i] = scale;
      }
    }
    char* to = panel.data + strip * 4;
    for (int64_t k0 = 0; k0 < source.k; k0 += kStageElements) {
      const int64_t left = source.k - k0;
      const int64_t count = left < kStageElements ? left : kStageElements;
      const int64_t padded = (count + kChunkElements - 1) / kChunkElements * kChunkElements;
      for (int i = 0; i < kStrip; ++i) {
        To* row = reinterpret_cast<To*>(stage[i]);
        const int64_t real = rows[i] == nullptr ? 0 : count;
        if (real > 0) convert<0>(rows[i] + k0, real, &inverse[i], row);
        if (real < padded) {
          __builtin_memset(row + real, 0, static_cast<size_t>(padded - real) * sizeof(To));
        }
        if constexpr (kIsS8<To>) {
          int32_t sum = 0;
          for (int64_t k = 0; k < real; ++k) sum += row[k];
          sums[i] += sum;
        }
      }
      const int64_t bytes = padded * static_cast<int64_t>(sizeof(To));
      for (int64_t at = 0; at < bytes; at += 16) {
        for (int i = 0; i < kStrip; i += 4) {
          transpose_quads(stage[i] + at, kStageBytes, to + i * 4, row_bytes);
        }
        to += 4 * row_bytes;
      }
    }
    if constexpr (kIsS8<To>) {
      for (int i = 0; i < kStrip; ++i) panel.sums[strip + i] = sums[i];
    }
  }
}

// The panel's columns of one k; those without a channel are not touched.
template <class From>
inline void load_columns(const PanelSource& source, int64_t k, From* line) {
  for (size_t r = 0; r < source.runs.size(); ++r) {
    const PackedWeights::ChannelRun& run = source.runs[r];
    if (run.count == 0) continue;
    const PanelSource::Matrix& matrix = source.matrices[r];
    const From* from = static_cast<const From*>(matrix.w) + k * matrix.row_stride + run.channel;
    if (k + kRowsAhead < source.k) {
      const char* ahead = reinterpret_cast<const char*>(from + kRowsAhead * matrix.row_stride);
      const int64_t bytes = run.count * run.step * static_cast<int64_t>(sizeof(From));
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at);
    }
    if (run.step == 2 && run.count == kColumns / 2) {  // a constant count becomes vectors
      for (int j = 0; j < kColumns / 2; ++j) line[run.column + j] = from[j * 2];
    } else if (run.step == 1) {
      __builtin_memcpy(line + run.column, from, static_cast<size_t>(run.count) * sizeof(From));
    } else {
      for (int j = 0; j < run.count; ++j) line[run.column + j] = from[j * 2];
    }
  }
}

// Rows of the source are k's: those of a group are converted and interleaved.
template <class From, class To>
void pack_k_rows(const PanelSource& source, const Panel& panel) {
  constexpr int kGroup = 4 / static_cast<int>(sizeof(To));
  constexpr int64_t kChunkElements = kChunk / static_cast<int64_t>(sizeof(To));
  From line[kColumns] = {};
  float inverse[kColumns] = {};
  int32_t sums[kColumns] = {};
  if constexpr (kIsS8<To>) {
    float scales[kColumns] = {};
    if constexpr (kIsS8<From>) {
      for (int j = 0; j < panel.width; ++j) scales[j] = given_scale(channel_of(source, j));
    } else {
      int32_t largest[kColumns] = {};
      for (int64_t k = 0; k < source.k; ++k) {
        load_columns(source, k, line);
        for (int j = 0; j < kColumns; ++j) {
          const int32_t m = magnitude(load_f32(line[j]));
          largest[j] = m > largest[j] ? m : largest[j];
        }
      }
      for (int j = 0; j < kColumns; ++j) scale_of(largest[j], &scales[j], &inverse[j]);
    }
    __builtin_memcpy(panel.scales, scales, static_cast<size_t>(panel.width) * sizeof(float));
  }
  const int64_t padded = (source.k + kChunkElements - 1) / kChunkElements * kChunkElements;
  char* to = panel.data;
  for (int64_t k0 = 0; k0 < padded; k0 += kGroup) {
    To rows[kGroup][kColumns];
    for (int g = 0; g < kGroup; ++g) {
      if (k0 + g < source.k) {
        load_columns(source, k0 + g, line);
        convert<1>(line, kColumns, inverse, rows[g]);
        if constexpr (kIsS8<To>) {
          for (int j = 0; j < kColumns; ++j) sums[j] += rows[g][j];
        }
      } else {
        __builtin_memset(rows[g], 0, sizeof(rows[g]));
      }
    }
    To groups[kColumns][kGroup];
    for (int j = 0; j < kColumns; ++j) {
      for (int g = 0; g < kGroup; ++g) groups[j][g] = rows[g][j];
    }
    __builtin_memcpy(to, groups, static_cast<size_t>(panel.width) * 4);
    to += int64_t{panel.width} * 4;
  }
  if constexpr (kIsS8<To>) {
    __builtin_memcpy(panel.sums, sums, static_cast<size_t>(panel.width) * sizeof(int32_t));
  }
}

template <class From, class To>
void pack_from_to(const PanelSource& source, const Panel& panel) {
  if (source.transposed) {
    pack_k_rows<From, To>(source, panel);
  } else {
    pack_channel_rows<From, To>(source, panel);
  }
}

template <class To>
void pack_to(const PanelSource& source, const Panel& panel) {
  switch (source.dtype) {
    case DType::kF32:
      return pack_from_to<float, To>(source, panel);
    case DType::kBf16:
      return pack_from_to<bf16, To>(source, panel);
    case DType::kF16:
      return pack_from_to<f16, To>(source, panel);
    default:
      if constexpr (kIsS8<To>) pack_from_to<int8_t, To>(source, panel);
  }
}

void pack_panel(const PanelSource& source, const Panel& panel) {
  switch (panel.dtype) {
    case DType::kF32:
      return pack_to<float>(source, panel);
    case DType::kBf16:
      return pack_to<bf16>(source, panel);
    default:
      return pack_to<int8_t>(source, panel);
  }
}

}  // namespace

}  // namespace moeops::grouped_matmul_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace moeops::bench {

// A value in [-1, 1) that depends on the seed and the index alone, well mixed.
inline float value_at(uint32_t seed, uint32_t index) {
  uint32_t h = index * 0x9E3779B1u + seed;  // the finaliser of MurmurHash3, a bijection
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  h ^= h >> 16;
  return static_cast<float>(static_cast<int32_t>(h)) * 0x1p-31f;
}

// One of a layer's GEMMs: y [rows, n] = x [rows, k] times an expert's [n, k], in the dtypes of
// --dtype. w8a8: y = bf16(f32(x w^T) * w_scale[n] * x_scale[row]); all experts' w_scale are alike.
struct GemmForm {
  int64_t n;
  int64_t k;
  DType x;  // and the weights'
  DType y;

  GemmForm(int64_t n_, int64_t k_, const std::string& dtype)
      : n(n_),
        k(k_),
        x(dtype == "w8a8"   ? DType::kS8
          : dtype == "bf16" ? DType::kBf16
                            : DType::kF32),
        y(x == DType::kF32 ? DType::kF32 : DType::kBf16) {}

  bool has_scales() const { return x == DType::kS8; }
  int64_t expert_bytes() const { return n * k * size_of(x); }
};

// Elements of the dtype of x, and what they stand for.
inline void store_value(DType dtype, float value, void* to, int64_t i) {
  if (dtype == DType::kF32) static_cast<float*>(to)[i] = value;
  if (dtype == DType::kBf16) static_cast<bf16*>(to)[i] = to_bf16(value);
  if (dtype == DType::kS8) {
    static_cast<int8_t*>(to)[i] = static_cast<int8_t>(std::lrint(127.0f * value));
  }
}
inline float load_value(DType dtype, const void* from, int64_t i) {
  if (dtype == DType::kBf16) return to_f32(static_cast<const bf16*>(from)[i]);
  if (dtype == DType::kS8) return static_cast<const int8_t*>(from)[i];
  return static_cast<const float*>(from)[i];
}

// w[expert][n][k] of any size, without keeping it: each row is a stretch of one table of random
// values, from a place of its own on. So filling memory with weights costs no more than copying.
class WeightValues {
 public:
  WeightValues(uint32_t seed, const GemmForm& form)
      : seed_(seed),
        form_(form),
        table_(std::make_shared<std::vector<char>>(
            static_cast<size_t>((kPlaces + form.k) * size_of(form.x)))) {
    for (int64_t i = 0; i < kPlaces + form.k; ++i) {
      store_value(form.x, value_at(seed, static_cast<uint32_t>(i)), table_->data(), i);
    }
    for (int64_t j = 0; form.has_scales() && j < form.n; ++j) {
      scales_.push_back(0x1p-7f + 0x1p-9f * value_at(seed + 1, static_cast<uint32_t>(j)));
    }
  }

  const GemmForm& form() const { return form_; }
  const void* row(int64_t expert, int64_t n) const {
    const uint32_t place =
        static_cast<uint32_t>(expert) * static_cast<uint32_t>(form_.n) + static_cast<uint32_t>(n);
    const double unit = 0.5 + 0.5 * static_cast<double>(value_at(seed_ + 2, place));
    return table_->data() +
           static_cast<int64_t>(unit * static_cast<double>(kPlaces - 1)) * size_of(form_.x);
  }
  void fill_expert(int64_t expert, void* to) const {
    const int64_t row_bytes = form_.k * size_of(form_.x);
    for (int64_t n = 0; n < form_.n; ++n) {
      std::memcpy(static_cast<char*>(to) + n * row_bytes, row(expert, n),
                  static_cast<size_t>(row_bytes));
    }
  }
  // [n], of every expert; empty without scales.
  const std::vector<float>& scales() const { return scales_; }

 private:
  static constexpr int64_t kPlaces = 1 << 20;

  uint32_t seed_;
  GemmForm form_;
  std::shared_ptr<std::vector<char>> table_;
  std::vector<float> scales_;
};

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

namespace moeops::bench {

// A value in [-1, 1) that depends on the seed and the index alone, well mixed. Weights of any size
// are made with it one expert at a time, and a single output is verified without keeping them.
inline float value_at(uint32_t seed, uint32_t index) {
  uint32_t h = index * 0x9E3779B1u + seed;  // the finaliser of MurmurHash3, a bijection
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  h ^= h >> 16;
  return static_cast<float>(static_cast<int32_t>(h)) * 0x1p-31f;
}

// w[expert][n][k], every expert with a seed of its own; n * k is below 2^32.
class WeightValues {
 public:
  WeightValues(uint32_t seed, int64_t k) : seed_(seed), k_(static_cast<uint32_t>(k)) {}

  float operator()(int64_t expert, int64_t n, int64_t k) const {
    return value_at(seed_of(expert), static_cast<uint32_t>(n) * k_ + static_cast<uint32_t>(k));
  }
  void fill_row(int64_t expert, int64_t n, float* to) const {
    const uint32_t seed = seed_of(expert);
    const uint32_t first = static_cast<uint32_t>(n) * k_;
    for (uint32_t k = 0; k < k_; ++k) to[k] = value_at(seed, first + k);
  }

 private:
  uint32_t seed_of(int64_t expert) const {
    return seed_ + 0x632BE5ABu * (static_cast<uint32_t>(expert) + 1);
  }

  uint32_t seed_;
  uint32_t k_;
};

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/huge_buffer.h>
#include <moeops/ops/packed_weights.h>
#include <moeops/ops/swiglu.h>
#include <moeops/ref/ref.h>

#include <optional>
#include <string>
#include <vector>

#include "bench/opbench/gemm_data.h"
#include "ops/grouped_matmul/tile_driver.h"

namespace moeops::bench {

// Throws tools::Error unless the status is ok.
void check(const Status& status);

// Packs the values of `experts` experts from `first` on, one at a time and a worker: never a second
// copy of the weights. `form` says what for; the sizes are the values'. Throws tools::Error.
void pack(const WeightValues& values, int64_t first, int64_t experts, PackedWeightsForm form,
          int threads, PackedWeights* out);
// The form of weights whose products pass through a SwiGLU.
inline PackedWeightsForm gate_up(const SwigluParams& swiglu) {
  return {.role = WeightRole::kGateUp, .gate = swiglu.gate};
}

// The kernel that the library's GEMMs use on these weights, in words.
std::string kernel_of(Context& ctx, const PackedWeights& weights);

// Prepares the driver as those GEMMs do, and gives the problem that their plan follows from.
// workers: 0 for as many as such a call alone gets.
grouped_matmul_internal::Problem prepare(Context& ctx, const PackedWeights& weights, int64_t rows,
                                         int64_t groups, int workers,
                                         grouped_matmul_internal::TileDriver* driver);
// That plan in words.
std::string plan_of(Context& ctx, const PackedWeights& weights, int64_t rows, int64_t groups,
                    int workers = 0);

// Weights as a model file has them: [experts, n, k].
class PlainWeights {
 public:
  void load(const WeightValues& values, int64_t experts, int threads);
  void unload() { buffer_ = HugeBuffer(); }

  const GemmForm& form() const { return *form_; }
  char* expert(int64_t e) const {
    return static_cast<char*>(buffer_.data()) + e * form_->expert_bytes();
  }
  // For the reference: all of them, or one as a matrix [n, k].
  ref::Weights view() const;
  ref::Weights matrix(int64_t e) const;

 private:
  std::optional<GemmForm> form_;
  int64_t experts_ = 0;
  HugeBuffer buffer_;
  std::vector<float> scales_;
};

}  // namespace moeops::bench

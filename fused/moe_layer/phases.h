// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/fused/moe_layer.h>

#include <chrono>

#include "ops/grouped_matmul/tile_driver.h"

namespace moeops::moe_layer_internal {

// Where one worker's time in a call went, in seconds.
struct alignas(64) Phases {
  double routing = 0;  // checks, sorting, plans: the caller's thread alone, before the others begin
  double prepare = 0;  // tokens as the GEMMs read them: quantised, weighted
  double gate_up = 0;  // the first GEMM, gathering its rows included
  double gate_up_epilogue = 0;  // SwiGLU, quantisation
  double down = 0;              // waiting for the rows of a group that another makes included
  double down_epilogue = 0;
  double combine = 0;
  double waiting = 0;  // for the other workers, at a barrier
};

// moe_layer, which adds what it took to phases [ctx.workers()]. For benchmarks.
Status moe_layer_in_phases(Context& ctx, const MoeLayerWeights& weights, const MoeLayerArgs& args,
                           Phases* phases);

// Says when a phase ends; without phases to add to, it does nothing.
class PhaseClock {
 public:
  explicit PhaseClock(Phases* phases) : phases_(phases) { restart(); }
  void restart() {
    if (phases_ != nullptr) last_ = Clock::now();
  }
  bool runs() const { return phases_ != nullptr; }
  // What happened since the last phase ended was this one.
  void end(double Phases::*phase) {
    if (phases_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    phases_->*phase += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  // So much of it was another.
  void move(double seconds, double Phases::*from, double Phases::*to) {
    phases_->*from -= seconds;
    phases_->*to += seconds;
  }

 private:
  using Clock = std::chrono::steady_clock;

  Phases* phases_;
  Clock::time_point last_;
};

// Measures the sink that it stands before.
class TimedSink final : public grouped_matmul_internal::TileSink {
 public:
  explicit TimedSink(TileSink& sink) : sink_(sink) {}
  double seconds() const { return seconds_; }
  void take(const grouped_matmul_internal::TileResult& tile) override {
    measure([&] { sink_.take(tile); });
  }
  void rows_complete(int64_t row, int64_t rows) override {
    measure([&] { sink_.rows_complete(row, rows); });
  }

 private:
  template <class Work>
  void measure(const Work& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  TileSink& sink_;
  double seconds_ = 0;
};

}  // namespace moeops::moe_layer_internal

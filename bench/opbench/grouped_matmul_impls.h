// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/machine.h>
#include <moeops/ops/grouped_matmul.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bench/opbench/gemm_data.h"
#include "bench/opbench/weights.h"

namespace moeops::bench {

struct Group {
  int64_t expert;
  int64_t rows;
};

// y [rows, n] = x [rows, k] times the weights of each group's expert, in the form's dtypes, or what
// an operator like it makes of them.
struct GemmCall {
  std::span<const Group> groups;
  const void* x;
  const float* x_scale;  // [rows]; null where the rows of x have none
  void* y;
  float* y_scale;  // [rows]; for operators that quantise their result
  int64_t rows;
};

// What --tune asks of an implementation.
struct TuneRequest {
  std::string cache;                    // the file that gets the plan
  int64_t experts;                      // of the problem that the weights stand for
  int64_t pairs;                        // of timings that decide
  double seconds;                       // of calls that are timed together, lest what disturbs one
                                        // short call drop a good plan
  std::function<GemmCall()> next_call;  // all of one load
};
struct TuneReport {
  std::string wrong;  // a plan that gives other bits; then nothing is tuned
  std::vector<std::string> lines;
};

// An implementation of grouped_matmul, with the weights it was last given.
class GroupedMatmulImpl {
 public:
  virtual ~GroupedMatmulImpl() = default;
  virtual std::string name() const = 0;
  // What ran, for the record: the kernel, the library's version and variant.
  virtual std::string detail() const = 0;
  // Makes and keeps the weights of `experts` experts; throws tools::Error.
  virtual void load(const WeightValues& values, int64_t experts, int threads) = 0;
  virtual void unload() = 0;
  virtual void run(const GemmCall& call) = 0;
  // How a call is cut up, in words; empty where there is nothing to say.
  virtual std::string explain(const GemmCall&) const { return {}; }
  // Finds the best plan for such calls, and runs them with it from now on.
  virtual TuneReport tune(const TuneRequest&) { return {}; }
};

// The reference: a function of the plain weights.
class GemmReference final : public GroupedMatmulImpl {
 public:
  using Function = Status (*)(const PlainWeights& weights, const GemmCall& call);
  explicit GemmReference(Function function) : function_(function) {}
  std::string name() const override { return "ref"; }
  std::string detail() const override {
    return "naive, one thread, double accumulation (s8: exact)";
  }
  void load(const WeightValues& values, int64_t experts, int threads) override {
    weights_.load(values, experts, threads);
  }
  void unload() override { weights_.unload(); }
  void run(const GemmCall& call) override { check(function_(weights_, call)); }

 private:
  Function function_;
  PlainWeights weights_;
};

// By name, those that can do the dtype with the ISA: moeops, openblas (f32), onednn (if this build
// found it), ref.
std::vector<std::string> grouped_matmul_impl_names(const std::string& dtype, Isa isa);
std::unique_ptr<GroupedMatmulImpl> make_grouped_matmul_impl(const std::string& name,
                                                            std::optional<Isa> isa);

// In a file of its own, that is compiled where libdnnl is found.
std::unique_ptr<GroupedMatmulImpl> make_onednn_grouped_matmul(Isa isa);

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#include "bench/limits/limits.h"

#include <moeops/ops/core/machine.h>
#include <omp.h>

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

namespace moeops {

namespace {

using limits::DotKernel;
using limits::kCopyUnit;
using limits::Kernels;

constexpr int kRepetitions = 8;

// A bandwidth measurement goes through the buffer once, a slice a repetition. So a byte comes up
// again only after most of the buffer, and no cache still has it.
constexpr int64_t kSlices = kRepetitions;

// Of a slice, for each thread: enough for every mix that copy_gbps() takes.
constexpr int64_t kLeastShare = int64_t{1} << 20;

// The best of this machine's kernels, up to an ISA, for each purpose; bf16 and s8 may have none.
Kernels best_kernels(Isa ceiling) {
  Kernels best;
  const auto fill_gaps = [&](Isa isa, Kernels (*get)()) {
    if (isa > ceiling || isa > machine().isa) return;
    const Kernels kernels = get();
    if (best.f32.run == nullptr) best.f32 = kernels.f32;
    if (best.bf16.run == nullptr) best.bf16 = kernels.bf16;
    if (best.s8.run == nullptr) best.s8 = kernels.s8;
    if (best.memory.read == nullptr) best.memory = kernels.memory;
  };
#define MOEOPS_LIMITS_KERNELS(suffix, isa) fill_gaps(isa, limits::kernels_##suffix);
#include "bench/limits/kernels.inc"
#undef MOEOPS_LIMITS_KERNELS
  return best;
}

const Kernels& kernels() {
  static const Kernels the_kernels = best_kernels(machine().isa);
  return the_kernels;
}

const Kernels& vector_kernels() {
  static const Kernels the_kernels = best_kernels(Isa::kAvx512Bf16);
  return the_kernels;
}

int64_t available_memory() {
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    int64_t kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %" SCNd64, &kib) == 1) return kib << 10;
  }
  return 0;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Sample {
  double amount;
  double seconds;
  double per_nanosecond() const { return amount / seconds * 1e-9; }
};

// Lets every thread do work(thread, threads), which returns how much it did. The time runs from
// the first thread's start to the last one's end.
template <class Work>
Sample run_team(int threads, const Work& work) {
  double amount = 0;
  double begin = std::numeric_limits<double>::infinity();
  double end = 0;
#pragma omp parallel num_threads(threads) reduction(+ : amount) reduction(min : begin) \
    reduction(max : end)
  {
#pragma omp barrier
    begin = now();
    amount = work(omp_get_thread_num(), omp_get_num_threads());
    end = now();
  }
  return {amount, end - begin};
}

double kernel_peak(const DotKernel& kernel, int threads) {
  const auto sample = [&kernel](int team, int64_t steps) {
    return run_team(team, [&](int, int) {
      (void)kernel.run(steps, 1, 1);
      return static_cast<double>(2 * steps * kernel.multiply_adds);
    });
  };
  // Repetitions of 2 to 4 ms: long against starting together, short against being interrupted. An
  // interruption must not pass for work here either, hence the faster of two.
  int64_t steps = 1 << 12;
  while (std::min(sample(1, steps).seconds, sample(1, steps).seconds) < 2e-3) steps *= 2;
  double best = 0;
  for (int i = 0; i < kRepetitions; ++i) {
    best = std::max(best, sample(threads, steps).per_nanosecond());
  }
  return best;
}

// bf16 and s8 may also be widened to f32.
double dtype_peak(const Kernels& of, DType dtype, int threads) {
  assert(dtype == DType::kF32 || dtype == DType::kBf16 || dtype == DType::kS8);
  const DotKernel& own = dtype == DType::kBf16 ? of.bf16 : of.s8;
  double best = kernel_peak(of.f32, threads);
  if (dtype != DType::kF32 && own.run != nullptr) best = std::max(best, kernel_peak(own, threads));
  return best;
}

// A thread's part of a slice of the buffer.
struct Share {
  char* data;
  int64_t bytes;
};

Share share_of(const HugeBuffer& buffer, int slice, int thread, int threads) {
  const int64_t slice_bytes = buffer.size() / kSlices;
  const int64_t bytes = slice_bytes / threads / kCopyUnit * kCopyUnit;
  static_assert(kCopyUnit % (limits::kStreams * limits::kBlock) == 0);
  return {static_cast<char*>(buffer.data()) + slice * slice_bytes + thread * bytes, bytes};
}

}  // namespace

Status LimitsMeter::create(int threads, LimitsMeter* meter, int64_t wanted) {
  if (threads < 1) {
    return {StatusCode::kInvalidArgument, "threads = %d, expected at least 1", threads};
  }
  constexpr int64_t kGranule = kSlices * kCopyUnit;
  const int64_t least = threads * kSlices * kLeastShare;
  if (wanted == 0) wanted = std::max(int64_t{1} << 30, 3 * machine().l3_bytes);
  const int64_t bytes =
      std::min(std::max(wanted, least), available_memory() / 4) / kGranule * kGranule;
  if (bytes < least) {
    return {StatusCode::kOutOfMemory,
            "measuring bandwidth with %d threads takes %" PRId64
            " bytes, but a quarter of the available memory is %" PRId64,
            threads, least, bytes};
  }
  LimitsMeter fresh;
  fresh.threads_ = threads;
  MOEOPS_RETURN_IF_ERROR(HugeBuffer::allocate(bytes, &fresh.buffer_));
  // Each thread touches what it will use, so that it lies in the thread's own NUMA node.
  (void)run_team(threads, [&](int thread, int team) {
    for (int slice = 0; slice < kSlices; ++slice) {
      const Share share = share_of(fresh.buffer_, slice, thread, team);
      std::memset(share.data, 1, static_cast<size_t>(share.bytes));
    }
    return 0.0;
  });
  *meter = std::move(fresh);
  return {};
}

Limits LimitsMeter::measure() const {
  Limits limits;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kS8}) {
    limits.dot_peak_gops.of(dtype) = dot_peak(dtype);
    limits.vector_dot_peak_gops.of(dtype) =
        machine().isa == Isa::kAmx ? vector_dot_peak(dtype) : limits.dot_peak_gops.of(dtype);
  }
  limits.read_gbps = read_gbps();
  limits.copy_gbps = copy_gbps(1, 1);
  return limits;
}

double LimitsMeter::dot_peak(DType dtype) const { return dtype_peak(kernels(), dtype, threads_); }

double LimitsMeter::vector_dot_peak(DType dtype) const {
  return dtype_peak(vector_kernels(), dtype, threads_);
}

double LimitsMeter::read_gbps() const {
  double best = 0;
  for (int slice = 0; slice < kSlices; ++slice) {
    const Sample sample = run_team(threads_, [&](int thread, int team) {
      const Share share = share_of(buffer_, slice, thread, team);
      (void)kernels().memory.read(share.data, share.bytes);
      return static_cast<double>(share.bytes);
    });
    best = std::max(best, sample.per_nanosecond());
  }
  return best;
}

double LimitsMeter::copy_gbps(int reads, int writes) const {
  assert(reads >= 1 && writes >= 1 && reads + writes <= kLeastShare / kCopyUnit);
  double best = 0;
  for (int slice = 0; slice < kSlices; ++slice) {
    const auto copy = slice % 2 == 0 ? kernels().memory.copy_non_temporal : kernels().memory.copy;
    const Sample sample = run_team(threads_, [&](int thread, int team) {
      const Share share = share_of(buffer_, slice, thread, team);
      const int64_t steps = share.bytes / ((reads + writes) * kCopyUnit);
      (void)copy(share.data, share.data + steps * reads * kCopyUnit, steps, reads, writes);
      return static_cast<double>(steps * (reads + writes) * kCopyUnit);
    });
    best = std::max(best, sample.per_nanosecond());
  }
  return best;
}

}  // namespace moeops

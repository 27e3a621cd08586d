// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <omp.h>

#include <cstdint>

namespace moeops {

// Opening a parallel region takes some microseconds, in which one core moves this much.
inline constexpr int64_t kSerialBytes = 64 << 10;

// Workers for a call that moves `bytes` in all, in at most `parts` pieces of work.
inline int workers_for(const Context& ctx, int64_t bytes, int64_t parts) {
  if (bytes <= kSerialBytes) return 1;
  const int workers = ctx.workers();
  return parts < workers ? static_cast<int>(parts) : workers;
}

// Calls work(worker, team) once on each of `workers` threads.
template <class Work>
void run_workers(int workers, Work work) {
  if (workers <= 1) {
    work(0, 1);  // without OpenMP, which would allocate a team of one
    return;
  }
#pragma omp parallel num_threads(workers)
  work(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <omp.h>

#include <atomic>
#include <cstdint>

namespace moeops {

// The workers of one parallel region, seen from one of them. Fewer may come than were asked for.
struct Team {
  int worker = 0;
  int size = 1;

  // What every worker did before it, every worker sees after it. A team of one has no region of its
  // own: an OpenMP barrier would wait for the threads of whoever called us.
  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// Runs work(team) on every worker. One worker runs without OpenMP, which would allocate a team.
template <class Work>
void run_team(int workers, const Work& work) {
  if (workers == 1) {
    work(Team{});
    return;
  }
#pragma omp parallel num_threads(workers)
  work(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Chunks of consecutive items, dealt to whoever asks: the calls of one team share one of these.
class Deal {
 public:
  Deal(int64_t items, int64_t chunk) : items_(items), chunk_(chunk) {}

  // False when everything is dealt.
  bool next(int64_t* begin, int64_t* end) {
    if (next_.load(std::memory_order_relaxed) >= items_) return false;
    *begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
    *end = *begin + chunk_ < items_ ? *begin + chunk_ : items_;
    return *begin < items_;
  }

 private:
  const int64_t items_;
  const int64_t chunk_;
  std::atomic<int64_t> next_{0};
};

// Workers for a call that moves this many bytes for this many tokens. A parallel region costs a
// few microseconds, as much as moving some 100 KiB within a core's caches: below twice that, and
// for the few tokens of a decode step, the caller's thread does it all.
int team_for(const Context& ctx, int64_t tokens, int64_t bytes);

// The same for a GEMM of so many rows, each of which meets `weight_bytes` bytes of weights.
int team_for_rows(const Context& ctx, int64_t rows, int64_t weight_bytes);

// Lets both use every worker however small the call: for tests of the parallel paths.
void split_small_calls(bool split);

// Whether an output of this size is better written past the caches: from 16 MiB on, where writing
// through them begins to be slower. What is smaller the next operator may still find there.
bool streams(int64_t bytes);

// Lets streams() say yes to every size: for tests of those paths.
void stream_small_outputs(bool stream);

}  // namespace moeops

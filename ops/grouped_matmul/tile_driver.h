// SPDX-License-Identifier: Apache-2.0
#pragma once

// The one loop behind every GEMM of the library: rows that are sorted into groups, each times the
// packed weights of its expert. Operators say where rows come from and where results go.

#include <moeops/ops/core/context.h>
#include <moeops/ops/packed_weights.h>

#include <atomic>
#include <cstdint>

#include "ops/grouped_matmul/kernels.h"
#include "ops/grouped_matmul/pack_rows.h"
#include "ops/grouped_matmul/plan.h"

namespace moeops::grouped_matmul_internal {

// Where rows come from: row i lies at data + (index ? index[i] : i) * stride, in the weights'
// dtype; for s8 weights as s8, or, where is_u8, as s8 + 128.
struct RowFeed {
  const char* data = nullptr;
  int64_t stride = 0;  // in bytes
  const int32_t* index = nullptr;
  bool is_u8 = false;
};

// A finished tile. s8: sums of (x + 128) * w, so that 128 * column_sums is still to be taken off.
struct TileResult {
  int64_t expert;
  int64_t row;  // the first one, of all groups' rows
  int rows;
  int64_t panel;
  int width;  // of the panel, padding included
  void* c;    // [rows][kPanelColumns] f32 or s32; the taker may write to it
};

// Where results go. Called by all workers at once, for different tiles.
class TileSink {
 public:
  virtual void take(const TileResult& tile) = 0;
  // All panels of the rows [row, row + rows) were taken, by whichever workers. Called only by a
  // driver that tracks rows.
  virtual void rows_complete(int64_t row, int64_t rows) { (void)row, (void)rows; }

 protected:
  ~TileSink() = default;
};

// Use: prepare; reserve scratch_bytes() and give it to start; add the groups that have rows; deal;
// then every worker of the call's one parallel region calls work. The scratch depends on max_rows
// and max_groups, not on the routing.
class TileDriver {
 public:
  Status prepare(Context& ctx, const PackedWeights& weights, int64_t max_rows, int64_t max_groups,
                 int workers, bool track_rows);

  const Plan& plan() const { return plan_; }
  const Problem& problem() const { return problem_; }
  const TileKernel& kernel() const { return *kernel_; }
  // What a tuning cache knows such calls by.
  TunedShape tuned_shape(const Context& ctx) const;

  int64_t scratch_bytes() const;
  void start(void* scratch, const GroupStatistics& groups);  // scratch is 64-byte aligned
  void add_group(int64_t expert, int64_t first_row, int64_t rows);
  void deal();

  // source: a driver that tracks rows, with the same groups, whose sink makes the rows of this one.
  // Its work is over for the calling worker; what others still do there is waited for, group by
  // group, which costs less than a barrier.
  void work(int worker, const RowFeed& feed, TileSink& sink, const TileDriver* source = nullptr);

 private:
  struct Group {
    int64_t expert;
    int64_t first_row;
    int64_t rows;
    int64_t first_task;   // its tasks: chunk after chunk, parts fastest
    int64_t first_chunk;  // its place among pending_
  };
  struct Task {
    const Group* group;
    int64_t chunk;  // of the group's rows
    int64_t first_panel;
    int64_t end_panel;
  };

  // What the next task reads first, as far as there is one and it is not there yet.
  struct Following {
    const char* panel = nullptr;
    RowsAhead rows;
  };

  static constexpr int64_t kNoTask = -1;

  int64_t worker_bytes() const { return x_bytes_ + c_bytes_; }
  void wait_for(int64_t group) const;
  int64_t next_task(int worker, int* helped) const;
  Task locate(int64_t task, int64_t* group) const;
  void run_task(const Task& task, Following following, const char* x, char* c,
                TileSink& sink) const;
  int block_rows(int64_t rows) const;
  int panels_together(int64_t rows, int64_t panel, int64_t end_panel) const;

  const PackedWeights* weights_ = nullptr;
  Problem problem_{};
  Plan plan_{};
  const TileKernel* kernel_ = nullptr;
  const void* code_ = nullptr;
  int64_t parts_ = 0;  // tasks of a chunk
  int64_t x_bytes_ = 0, c_bytes_ = 0;
  int64_t max_groups_ = 0, max_chunks_ = 0;

  char* workers_scratch_ = nullptr;
  char* dealt_ = nullptr;  // of each worker's tasks, how many: an atomic int64_t on its own line
  Group* groups_ = nullptr;
  int64_t group_count_ = 0;
  std::atomic<int32_t>* pending_ = nullptr;  // parts of a chunk that are not finished; or null
  int64_t chunk_count_ = 0;
  int64_t tasks_ = 0;
};

}  // namespace moeops::grouped_matmul_internal

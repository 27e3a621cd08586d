// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/tile_driver.h"

#include <algorithm>
#include <cinttypes>
#include <new>
#include <thread>

namespace moeops::grouped_matmul_internal {

namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// While another thread is waited for, one that shares the core may use it.
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// From about here on a group's arithmetic takes longer than its weights take to come.
constexpr int64_t kManyRows = 12;

constexpr int64_t kLine = 64;
constexpr int64_t whole_lines(int64_t bytes) { return divide_up(bytes, kLine) * kLine; }

}  // namespace

Status TileDriver::prepare(Context& ctx, const PackedWeights& weights, int64_t max_rows,
                           int64_t max_groups, int workers, bool track_rows) {
  weights_ = &weights;
  const int64_t panels = weights.panels();
  MOEOPS_RETURN_IF_ERROR(choose_kernel(
      ctx, weights.dtype(), {panels > 0 ? weights.panel_width(panels - 1) : 0, weights.k_chunks()},
      &kernel_, &code_));
  problem_ = {.max_rows = max_rows,
              .groups = {},
              .panels = panels,
              .k_chunks = weights.k_chunks(),
              .row_block = kernel_->row_block,
              .tile_rows = kernel_->tile_rows,
              .panels_together = kernel_->panels,
              .l2_bytes = machine().l2_bytes,
              .workers = workers};
  // Plans are tuned with all workers.
  if (ctx.tuning() != nullptr && workers == ctx.threads()) {
    const TunedPlan* tuned = ctx.tuning()->find(tuned_shape(ctx));
    if (tuned != nullptr) problem_.tuned = *tuned;
  }
  plan_ = make_plan(problem_);
  if (__builtin_mul_overflow(plan_.chunk_rows * kChunkBytes, weights.k_chunks(), &x_bytes_) ||
      x_bytes_ > INT64_MAX / 2 / workers) {
    return {StatusCode::kOutOfMemory, "there is no memory for rows of K = %" PRId64, weights.k()};
  }
  // With K in one block a tile's sums leave at once; else those of a whole chunk wait.
  const int64_t tile_rows = std::min<int64_t>(kernel_->tile_rows, plan_.chunk_rows);
  const int64_t c_rows =
      std::max(plan_.k_block >= weights.k_chunks() ? tile_rows : plan_.chunk_rows,
               std::min<int64_t>(kernel_->stream_rows, plan_.chunk_rows) * kernel_->panels);
  c_bytes_ = c_rows * kPanelColumns * 4;
  max_groups_ = max_groups;
  max_chunks_ = track_rows ? max_rows / plan_.chunk_rows + max_groups : 0;
  return {};
}

TunedShape TileDriver::tuned_shape(const Context& ctx) const {
  return {
      .isa = ctx.isa(),
      .threads = ctx.threads(),
      .dtype = kernel_->dtype,
      .kernel = TunedShape::name_of(kernel_->name),
      .panels = problem_.panels,
      .k_chunks = problem_.k_chunks,
      .rows = TunedShape::row_class(problem_.max_rows),
      .rows_per_expert = TunedShape::row_class_of_expert(problem_.max_rows, weights_->experts())};
}

int64_t TileDriver::scratch_bytes() const {
  return problem_.workers * (worker_bytes() + kLine) +
         whole_lines(max_groups_ * static_cast<int64_t>(sizeof(Group))) +
         whole_lines(max_chunks_ * static_cast<int64_t>(sizeof(std::atomic<int32_t>)));
}

void TileDriver::start(void* scratch, const GroupStatistics& groups) {
  problem_.groups = groups;
  plan_ = make_plan(problem_);
  parts_ = divide_up(std::max<int64_t>(problem_.panels, 1), plan_.task_panels);
  workers_scratch_ = static_cast<char*>(scratch);
  char* at = workers_scratch_ + problem_.workers * worker_bytes();
  dealt_ = at;
  for (int w = 0; w < problem_.workers; ++w) new (dealt_ + w * kLine) std::atomic<int64_t>(0);
  at += problem_.workers * kLine;
  groups_ = reinterpret_cast<Group*>(at);
  at += whole_lines(max_groups_ * static_cast<int64_t>(sizeof(Group)));
  pending_ = max_chunks_ > 0 ? reinterpret_cast<std::atomic<int32_t>*>(at) : nullptr;
  group_count_ = chunk_count_ = tasks_ = 0;
}

void TileDriver::add_group(int64_t expert, int64_t first_row, int64_t rows) {
  groups_[group_count_++] = {expert, first_row, rows, 0, 0};
}

// Groups of many rows keep the arithmetic busy, those of few the memory. Where there are both, the
// first half of the workers begins with the largest, the other half with the smallest, so that each
// asks for what the other leaves, and what is left for the end is of middle size. (Zipf of 1.1 over
// 128 experts, 8 to 64 rows on average: 1 to 3% faster; groups that are all alike lose 0.3% when
// they are not read in the order that they lie in.) The order depends on the rows alone: drivers
// with the same groups have the same.
void TileDriver::deal() {
  Group* end = groups_ + group_count_;
  const auto fewer = [](const Group& a, const Group& b) { return a.rows < b.rows; };
  const auto [smallest, largest] = std::minmax_element(groups_, end, fewer);
  if (group_count_ > 1 && largest->rows > kManyRows && largest->rows >= 8 * smallest->rows) {
    std::sort(groups_, end, [](const Group& a, const Group& b) {
      return a.rows != b.rows ? a.rows > b.rows : a.first_row < b.first_row;
    });
    std::reverse(groups_ + group_count_ / 2, end);
  }
  for (Group* g = groups_; g < end; ++g) {
    g->first_task = tasks_;
    g->first_chunk = chunk_count_;
    const int64_t chunks = divide_up(g->rows, plan_.chunk_rows);
    tasks_ += chunks * parts_;
    if (pending_ != nullptr) {
      for (int64_t i = 0; i < chunks; ++i) {
        // The last part leaves 1 until the sink was told.
        new (pending_ + chunk_count_ + i) std::atomic<int32_t>(static_cast<int32_t>(parts_) + 1);
      }
    }
    chunk_count_ += chunks;
  }
}

// Every worker has a run of tasks of its own, whose weights lie one after another: the processor
// sees that they are read in order. Whoever is done helps the next one.
int64_t TileDriver::next_task(int worker, int* helped) const {
  for (; *helped < problem_.workers; ++*helped) {
    const int owner = (worker + *helped) % problem_.workers;
    auto* dealt = std::launder(reinterpret_cast<std::atomic<int64_t>*>(dealt_ + owner * kLine));
    const int64_t task =
        tasks_ * owner / problem_.workers + dealt->fetch_add(1, std::memory_order_relaxed);
    if (task < tasks_ * (owner + 1) / problem_.workers) return task;
  }
  return kNoTask;
}

// *group: where the last one was, or any other; within a run groups ascend.
TileDriver::Task TileDriver::locate(int64_t task, int64_t* group) const {
  if (groups_[*group].first_task > task) *group = 0;
  while (*group + 1 < group_count_ && groups_[*group + 1].first_task <= task) ++*group;
  const Group& g = groups_[*group];
  const int64_t part = (task - g.first_task) % parts_;
  const int64_t first_panel = part * plan_.task_panels;
  return {&g, (task - g.first_task) / parts_, first_panel,
          std::min(first_panel + plan_.task_panels, weights_->panels())};
}

// Whoever holds a task of the group does that, and perhaps the one that it held before, and waits
// for nobody: the wait is short.
void TileDriver::wait_for(int64_t group) const {
  const Group& g = groups_[group];
  const int64_t chunks = divide_up(g.rows, plan_.chunk_rows);
  for (int64_t i = 0; i < chunks; ++i) {
    int tries = 0;
    while (pending_[g.first_chunk + i].load(std::memory_order_acquire) != 0) {
      if (tries < 1000) {
        ++tries;
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }
}

void TileDriver::work(int worker, const RowFeed& feed, TileSink& sink, const TileDriver* source) {
  char* x = workers_scratch_ + worker * worker_bytes();
  char* c = x + x_bytes_;
  const SourceRows source_rows = {.base = feed.data,
                                  .stride = feed.stride,
                                  .index = feed.index,
                                  .bytes = weights_->k() * size_of(weights_->dtype()),
                                  .add_128 = weights_->dtype() == DType::kS8 && !feed.is_u8};
  if (kernel_->begin != nullptr) kernel_->begin();
  const Group* packed_group = nullptr;
  int64_t packed_chunk = -1;
  int64_t group = 0;
  int helped = 0;
  int64_t task = next_task(worker, &helped);
  while (task != kNoTask) {
    const Task now = locate(task, &group);
    const int64_t first = now.chunk * plan_.chunk_rows;
    const int64_t rows = std::min(plan_.chunk_rows, now.group->rows - first);
    // The next task is taken already, so that what it begins with can be asked for.
    task = next_task(worker, &helped);
    Following following;
    if (task != kNoTask) {
      int64_t next_group = group;
      const Task next = locate(task, &next_group);
      following.panel = weights_->panel(next.group->expert, next.first_panel);
      if (next.group != now.group || next.chunk != now.chunk) {
        const int64_t next_first = next.chunk * plan_.chunk_rows;
        following.rows = {source_rows, next.group->first_row + next_first,
                          std::min(plan_.chunk_rows, next.group->rows - next_first)};
      }
    }
    if (now.group != packed_group || now.chunk != packed_chunk) {
      if (source != nullptr && now.group != packed_group) source->wait_for(group);
      packed_group = now.group;
      packed_chunk = now.chunk;
      pack_rows(source_rows, now.group->first_row + first, rows, block_rows(rows),
                weights_->k_chunks(), x);
    }
    run_task(now, following, x, c, sink);
    if (pending_ != nullptr) {
      std::atomic<int32_t>& pending = pending_[now.group->first_chunk + now.chunk];
      if (pending.fetch_sub(1, std::memory_order_acq_rel) == 2) {
        sink.rows_complete(now.group->first_row + first, rows);
        pending.store(0, std::memory_order_release);
      }
    }
  }
  if (kernel_->end != nullptr) kernel_->end();
}

void TileDriver::run_task(const Task& task, Following following, const char* x, char* c,
                          TileSink& sink) const {
  const int64_t k_chunks = weights_->k_chunks();
  const int64_t first = task.chunk * plan_.chunk_rows;
  const int64_t rows = std::min(plan_.chunk_rows, task.group->rows - first);
  const int row_block = block_rows(rows);
  const int64_t tile_blocks = kernel_->tile_rows / kernel_->row_block;
  const int64_t tile_rows = tile_blocks * row_block;
  const int64_t tiles = divide_up(rows, tile_rows);
  const int64_t block_bytes = row_block * k_chunks * kChunkBytes;
  const bool one_block = plan_.k_block >= k_chunks;

  int together = 0;
  for (int64_t panel = task.first_panel; panel < task.end_panel; panel += together) {
    const char* data = weights_->panel(task.group->expert, panel);
    const int width = weights_->panel_width(panel);
    together = panels_together(rows, panel, task.end_panel);
    // K = 0 still has one block, of no chunks, which leaves sums of 0.
    int64_t k = 0;
    do {
      const int64_t k_end = std::min(k + plan_.k_block, k_chunks);
      // What is read next: the panels' next block, the next panels, or the next task's first ones.
      const char* next = data + k_end * kChunkGroups * width * 4;
      int64_t next_lines = std::min(plan_.k_block, k_chunks - k_end) * width;
      if (k_end == k_chunks) {
        next = panel + together < task.end_panel
                   ? weights_->panel(task.group->expert, panel + together)
                   : following.panel;
        next_lines = std::min(plan_.k_block, k_chunks) * kPanelColumns * together;
      }
      // Several panels are streamed, and what comes next is the kernel's care.
      if (next == nullptr || together > 1) next_lines = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        Tile tile;
        tile.panel = data + k * kChunkGroups * width * 4;
        tile.width = width;
        tile.x = x + t * tile_blocks * block_bytes + k * row_block * kChunkBytes;
        tile.row_block = row_block;
        tile.x_block_bytes = block_bytes;
        tile.rows = static_cast<int>(std::min(tile_rows, rows - t * tile_rows));
        tile.k_chunks = k_end - k;
        tile.c = one_block ? c : c + t * tile_rows * kPanelColumns * 4;
        tile.accumulate = k > 0;
        const int64_t first_line = next_lines * t / tiles;
        const int64_t end_line = next_lines * (t + 1) / tiles;
        tile.prefetch = end_line > first_line ? next + first_line * kLine : nullptr;
        tile.prefetch_lines = end_line - first_line;
        tile.panels = together;
        tile.panel_bytes = weights_->panel_bytes();
        tile.c_bytes = divide_up(tile.rows, row_block) * row_block * kPanelColumns * 4;
        tile.next = next;
        if (k == 0) {
          following.rows.ask((panel - task.first_panel) * tiles + t + 1,
                             (task.end_panel - task.first_panel) * tiles);
        }
        if (tile.k_chunks > 0) {
          kernel_->run(code_, tile);
        } else {
          std::fill_n(static_cast<int32_t*>(tile.c), tile.c_bytes / 4 * together, 0);
        }
        for (int p = 0; k_end == k_chunks && p < together; ++p) {
          sink.take({task.group->expert, task.group->first_row + first + t * tile_rows, tile.rows,
                     panel + p, width, static_cast<char*>(tile.c) + p * tile.c_bytes});
        }
      }
      k = k_end;
    } while (k < k_chunks);
  }
}

// Rows of the blocks of so many rows.
int TileDriver::block_rows(int64_t rows) const {
  if (!kernel_->even_blocks) return kernel_->row_block;
  return static_cast<int>(divide_up(rows, divide_up(rows, kernel_->row_block)));
}

// Panels of one width, as many as the kernel takes.
int TileDriver::panels_together(int64_t rows, int64_t panel, int64_t end_panel) const {
  if (rows > kernel_->stream_rows) return 1;
  int64_t together = std::min<int64_t>(kernel_->panels, end_panel - panel);
  const bool last_differs = panel + together == weights_->panels() &&
                            weights_->panel_width(weights_->panels() - 1) != kPanelColumns;
  if (last_differs && together > 1) --together;
  return static_cast<int>(together);
}

}  // namespace moeops::grouped_matmul_internal

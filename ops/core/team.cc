// SPDX-License-Identifier: Apache-2.0
#include "ops/core/team.h"

#include <algorithm>

namespace moeops {

namespace {

constexpr int64_t kFewTokens = 8;
constexpr int64_t kFewBytes = int64_t{256} << 10;

std::atomic<bool> split_all{false};
std::atomic<bool> stream_all{false};

}  // namespace

int team_for(const Context& ctx, int64_t tokens, int64_t bytes) {
  const bool small = tokens <= kFewTokens || bytes < kFewBytes;
  return small && !split_all.load(std::memory_order_relaxed) ? 1 : ctx.workers();
}

int team_for_rows(const Context& ctx, int64_t rows, int64_t weight_bytes) {
  const bool small = rows < kFewBytes / std::max<int64_t>(weight_bytes, 1);
  return small && !split_all.load(std::memory_order_relaxed) ? 1 : ctx.workers();
}

void split_small_calls(bool split) { split_all.store(split, std::memory_order_relaxed); }

bool streams(int64_t bytes) {
  return bytes >= (int64_t{16} << 20) || stream_all.load(std::memory_order_relaxed);
}

void stream_small_outputs(bool stream) { stream_all.store(stream, std::memory_order_relaxed); }

}  // namespace moeops

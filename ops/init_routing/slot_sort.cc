// SPDX-License-Identifier: Apache-2.0
#include "ops/init_routing/slot_sort.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace moeops::routing_internal {

namespace {

// Counters that are cheap whatever N is: 4 KiB a worker.
constexpr int64_t kFewGroups = 1024;

// A worker's counters begin on a cache line of their own.
constexpr int64_t kCountersPerLine = 64 / sizeof(int32_t);

constexpr int64_t whole_lines(int64_t counters) {
  return (counters + kCountersPerLine - 1) / kCountersPerLine * kCountersPerLine;
}

bool is_legal(const SlotChoices& choices, int64_t id) {
  return (id >= 0 && id < choices.expert_count) ||
         (choices.allow_masked && (id == -1 || id == choices.expert_count));
}

}  // namespace

// What one worker found in its part; on a cache line of its own.
struct alignas(64) SlotSort::Part {
  int64_t bad_slot;
  int64_t most;  // the highest kept expert, less begin; -1 without one
};

struct SlotSort::Keyed {
  uint32_t key;
  int32_t slot;
};

SlotSort::SlotSort(const SlotChoices& choices, int workers)
    : choices_(choices),
      N_(choices.expert_ids.dim(0) * choices.expert_ids.dim(1)),
      workers_(workers) {
  const int64_t experts = choices.end - choices.begin;
  most_groups_ = std::min(experts, std::max(kFewGroups, 4 * N_));
  wide_ = experts > most_groups_;
  // Each worker has all the counters while they are few. Beyond that 8 N of them must do, for as
  // many workers as get theirs; two always do.
  counters_ = std::min(workers_ * whole_lines(most_groups_),
                       std::max(workers_ * whole_lines(std::min(most_groups_, kFewGroups)),
                                2 * whole_lines(most_groups_)));
  Carver sizes;
  lay_out(sizes);
  scratch_bytes_ = sizes.bytes();
  groups_ = most_groups_;
  split();
  if (wide_) parts_ = workers_;  // to scan, which takes no counters
}

void SlotSort::split() {
  parts_ = std::clamp(counters_ / whole_lines(std::max<int64_t>(groups_, 1)), int64_t{1}, workers_);
}

void SlotSort::lay_out(Carver& scratch) {
  part_ = scratch.take<Part>(workers_);
  first_ = scratch.take<int32_t>(most_groups_ + 1);
  counter_ = scratch.take<int32_t>(counters_);
  if (!wide_) return;
  numbered_ = scratch.take<int32_t>(N_);
  group_of_ = scratch.take<int32_t>(N_);
  keyed_ = scratch.take<Keyed>(2 * N_);
}

void SlotSort::set_scratch(void* scratch) {
  Carver arrays(scratch);
  lay_out(arrays);
}

// visit(slot, id) for the part's slots in their order.
template <class Visit>
void SlotSort::for_each_choice(int64_t part, Visit visit) const {
  const ConstTensorView& ids = choices_.expert_ids;
  const int64_t K = ids.dim(1);
  const int64_t begin = token_at(part);
  const int64_t end = token_at(part + 1);
  int64_t slot = begin * K;
  if (ids.row_stride == K) {
    const int32_t* dense = ids.row<int32_t>(0);
    for (; slot < end * K; ++slot) visit(slot, int64_t{dense[slot]});
    return;
  }
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* row = ids.row<int32_t>(t);
    for (int64_t k = 0; k < K; ++k, ++slot) visit(slot, int64_t{row[k]});
  }
}

void SlotSort::count(const Team& team) {
  if (wide_) {
    for (int64_t part = team.worker; part < parts_; part += team.size) scan_part(part);
    team.barrier();
    if (team.worker == 0) narrow();
    team.barrier();
    if (bad_slot_ >= 0) return;
  }
  for (int64_t part = team.worker; part < parts_; part += team.size) count_part(part);
  team.barrier();
  if (team.worker == 0) merge();
  team.barrier();
}

// Of a wide range: how wide it is in use.
void SlotSort::scan_part(int64_t part) {
  int64_t bad = -1;
  int64_t most = -1;
  for_each_choice(part, [&](int64_t slot, int64_t id) {
    if (id >= choices_.begin && id < choices_.end) {
      most = std::max(most, id - choices_.begin);
    } else if (bad < 0 && !is_legal(choices_, id)) {
      bad = slot;
    }
  });
  part_[part] = {bad, most};
}

void SlotSort::narrow() {
  int64_t most = -1;
  for (int64_t part = 0; part < parts_; ++part) {
    if (bad_slot_ < 0) bad_slot_ = part_[part].bad_slot;
    most = std::max(most, part_[part].most);
  }
  if (bad_slot_ >= 0) return;
  groups_ = most + 1;
  if (groups_ > most_groups_) {
    int64_t bits = 1;
    while (most >> bits != 0) ++bits;
    number_experts(bits);
  }
  split();
}

// Numbers the experts that were chosen, at most N of them, by a radix sort of the kept slots on the
// `bits` bits of their experts.
void SlotSort::number_experts(int64_t bits) {
  constexpr int64_t kDigitBits = 11;
  constexpr size_t kDigits = size_t{1} << kDigitBits;
  Keyed* from = keyed_;
  Keyed* to = keyed_ + N_;
  int64_t kept = 0;
  parts_ = 1;
  for_each_choice(0, [&](int64_t slot, int64_t id) {
    group_of_[slot] = -1;
    if (id < choices_.begin || id >= choices_.end) return;
    from[kept++] = {static_cast<uint32_t>(id - choices_.begin), static_cast<int32_t>(slot)};
  });
  for (int64_t shift = 0; shift < bits; shift += kDigitBits) {
    const auto digit = [&](const Keyed& k) { return (k.key >> shift) % kDigits; };
    int32_t next[kDigits] = {};
    for (int64_t i = 0; i < kept; ++i) ++next[digit(from[i])];
    int32_t sum = 0;
    for (int32_t& n : next) n = std::exchange(sum, sum + n);
    for (int64_t i = 0; i < kept; ++i) to[next[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  groups_ = 0;
  for (int64_t i = 0; i < kept; ++i) {
    if (i == 0 || from[i].key != from[i - 1].key) {
      numbered_[groups_++] = static_cast<int32_t>(from[i].key);
    }
    group_of_[from[i].slot] = static_cast<int32_t>(groups_ - 1);
  }
  experts_ = numbered_;
}

void SlotSort::count_part(int64_t part) {
  int32_t* counter = counter_ + part * whole_lines(groups_);
  std::memset(counter, 0, static_cast<size_t>(groups_) * sizeof(int32_t));
  int64_t bad = -1;
  if (experts_ != nullptr) {
    const int64_t K = choices_.expert_ids.dim(1);
    for (int64_t slot = token_at(part) * K; slot < token_at(part + 1) * K; ++slot) {
      if (group_of_[slot] >= 0) ++counter[group_of_[slot]];
    }
  } else {
    for_each_choice(part, [&](int64_t slot, int64_t id) {
      const int64_t group = id - choices_.begin;
      if (group >= 0 && group < groups_) {
        ++counter[group];
      } else if (bad < 0 && !is_legal(choices_, id)) {
        bad = slot;
      }
    });
  }
  part_[part].bad_slot = bad;
}

// Each part's counts become the places of its first slots.
void SlotSort::merge() {
  for (int64_t part = 0; part < parts_ && bad_slot_ < 0; ++part) bad_slot_ = part_[part].bad_slot;
  int32_t sum = 0;
  for (int64_t group = 0; group < groups_; ++group) {
    first_[group] = sum;
    for (int64_t part = 0; part < parts_; ++part) {
      int32_t& counter = counter_[part * whole_lines(groups_) + group];
      counter = std::exchange(sum, sum + counter);
    }
  }
  first_[groups_] = sum;
  slots_ = sum;
}

int64_t SlotSort::group_from(int64_t expert) const {
  const int64_t less_begin = expert - choices_.begin;
  if (experts_ == nullptr) return std::clamp<int64_t>(less_begin, 0, groups_);
  return std::lower_bound(experts_, experts_ + groups_, less_begin) - experts_;
}

void SlotSort::place(const Team& team, const SlotPlaces& places) {
  for (int64_t part = team.worker; part < parts_; part += team.size) {
    if (places.capacity > 0) {
      place_part(part, places, [&](int64_t group, int64_t place) {
        const int64_t position = place - first_[group];
        return position < places.capacity
                   ? (expert(group) - choices_.begin) * places.capacity + position
                   : -1;
      });
    } else {
      place_part(part, places,
                 [&](int64_t, int64_t place) { return place < places.rows ? place : -1; });
    }
  }
}

// row_of(group, place): the row of the slot that comes at this place of the sorted order, or -1.
template <class RowOf>
void SlotSort::place_part(int64_t part, const SlotPlaces& places, RowOf row_of) {
  int32_t* counter = counter_ + part * whole_lines(groups_);
  const auto place_slot = [&](int64_t slot, int64_t group) {
    const int64_t row = group >= 0 && group < groups_ ? row_of(group, counter[group]++) : -1;
    if (places.row_of_slot != nullptr) places.row_of_slot[slot] = static_cast<int32_t>(row);
    if (places.slot_of_row != nullptr && row >= 0) {
      places.slot_of_row[row] = static_cast<int32_t>(slot);
    }
  };
  if (experts_ != nullptr) {
    const int64_t K = choices_.expert_ids.dim(1);
    for (int64_t slot = token_at(part) * K; slot < token_at(part + 1) * K; ++slot) {
      place_slot(slot, group_of_[slot]);
    }
  } else {
    for_each_choice(part, [&](int64_t slot, int64_t id) { place_slot(slot, id - choices_.begin); });
  }
}

}  // namespace moeops::routing_internal

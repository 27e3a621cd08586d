// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/tensor.h>

#include <cstdint>

#include "ops/core/carver.h"
#include "ops/core/team.h"

namespace moeops::routing_internal {

// Slot t * K + k is the k-th choice of token t; expert_ids [T, K] i32 says whom it chose.
struct SlotChoices {
  ConstTensorView expert_ids;  // its view is checked, its ids are not; T * K fits in i32
  int64_t expert_count;        // the legal ids are [0, expert_count)
  int64_t begin;               // the slots of the experts in [begin, end) are kept,
  int64_t end;                 // within [0, expert_count)
  bool allow_masked;           // -1 and expert_count are legal too, and not kept
};

// Where the rows of the sorted slots are, and what place() writes.
struct SlotPlaces {
  // 0: slot i of the sorted order has row i, up to `rows`. Above: expert e's first `capacity` slots
  // have the rows from (e - begin) * capacity on, and `rows` is not read.
  int64_t capacity = 0;
  int64_t rows = 0;
  int32_t* row_of_slot = nullptr;  // [N], optional; -1: the slot has no row
  int32_t* slot_of_row = nullptr;  // optional; written where a slot has the row
};

// The kept slots by (expert, slot) ascending: a stable counting sort, each worker counting and then
// placing the slots of its own tokens. O(N + experts): where that would be more counters than
// O(N), the experts that were chosen are numbered first. Used by every operator that brings tokens
// to their experts.
//
//   SlotSort sort(choices, workers);
//   sort.set_scratch(...);                  // sort.scratch_bytes() of it, aligned to 64
//   in a team:
//     sort.count(team);
//     if (sort.bad_slot() >= 0) return;     // nothing was written but scratch
//     sort.place(team, places);
//     team.barrier();                       // before others' rows are read
class SlotSort {
 public:
  SlotSort(const SlotChoices& choices, int workers);

  int64_t scratch_bytes() const { return scratch_bytes_; }
  void set_scratch(void* scratch);

  // By every worker of the team, which waits for all of them. What follows holds after it.
  void count(const Team& team);

  // The first slot with an illegal id, -1 if all are legal. If one is not, nothing else holds.
  int64_t bad_slot() const { return bad_slot_; }
  int64_t slots() const { return slots_; }  // kept ones

  // The groups of slots, by expert ascending. Experts without slots may or may not have one.
  int64_t groups() const { return groups_; }
  int64_t expert(int64_t group) const {
    return choices_.begin + (experts_ == nullptr ? group : experts_[group]);
  }
  // The first group whose expert is at least this one.
  int64_t group_from(int64_t expert) const;
  int64_t first(int64_t group) const { return first_[group]; }  // in sorted order
  int64_t count(int64_t group) const { return first_[group + 1] - first_[group]; }

  // By every worker of the team, which does not wait. Once.
  void place(const Team& team, const SlotPlaces& places);

 private:
  struct Part;
  struct Keyed;

  void lay_out(Carver& scratch);
  int64_t token_at(int64_t part) const { return choices_.expert_ids.dim(0) * part / parts_; }
  template <class Visit>
  void for_each_choice(int64_t part, Visit visit) const;
  template <class RowOf>
  void place_part(int64_t part, const SlotPlaces& places, RowOf row_of);

  void split();
  void scan_part(int64_t part);
  void narrow();
  void number_experts(int64_t bits);
  void count_part(int64_t part);
  void merge();

  const SlotChoices choices_;
  const int64_t N_;
  const int64_t workers_;
  int64_t most_groups_;  // that may be counted without numbering the experts
  int64_t counters_;     // there are, for all parts together
  bool wide_;            // the range has more experts than that
  int64_t scratch_bytes_;

  int64_t groups_ = 0;
  int64_t parts_ = 0;  // of the tokens, each counted and placed by one worker
  int64_t slots_ = 0;
  int64_t bad_slot_ = -1;

  Part* part_ = nullptr;              // [workers]
  int32_t* first_ = nullptr;          // [groups + 1]
  int32_t* counter_ = nullptr;        // [parts][groups]: slots counted, then the next one's place
  const int32_t* experts_ = nullptr;  // [groups], less begin; null: group g is expert begin + g
  // The rest of wide ranges only.
  int32_t* numbered_ = nullptr;  // [N]: what experts_ points to where they are numbered
  int32_t* group_of_ = nullptr;  // [N], then; -1 for slots not kept
  Keyed* keyed_ = nullptr;       // [2][N]
};

}  // namespace moeops::routing_internal

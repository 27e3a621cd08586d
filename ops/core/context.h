// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/huge_buffer.h>
#include <moeops/ops/core/machine.h>
#include <moeops/ops/core/status.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>

namespace moeops {

struct Tuning;  // ops/core/tuning.h

struct ContextOptions {
  int threads = 0;  // workers of a call; 0: as many CPUs as the process may use
  std::optional<Isa> isa =
      {};  // lowers the choice of kernels; absent: MOEOPS_ISA, else the machine's
  // A file of plans that `opbench --tune` found faster here; null: none. It changes no result, and
  // one that cannot be read, or was made by another version or on another machine, is ignored.
  const char* tuning_cache = nullptr;
};

// What a call runs with: its workers, its kernels and its scratch memory.
//
// A context serves one call at a time; different contexts run concurrently, from any threads.
// Called inside somebody's OpenMP parallel region, an operator runs on its caller's thread alone.
// Results do not depend on the number of workers. After the first call with a shape, no operator
// allocates: scratch and JIT-made kernels stay here.
class Context {
 public:
  // Never fails and never throws: bad options (negative threads, an ISA above the machine's, an
  // unknown name in MOEOPS_ISA) are kept and returned by status() and by every call.
  explicit Context(const ContextOptions& options = {}) noexcept;

  Status status() const { return status_; }
  int threads() const { return threads_; }
  Isa isa() const { return isa_; }
  // Why the tuning cache is ignored; ok when it is not, or when there is none.
  Status tuning_status() const { return tuning_status_; }
  // How many of its plans are for this ISA and number of threads.
  int64_t tuned_plans() const noexcept;

  // --- for operators ---
  // Workers for a call made here and now: 1 inside an active parallel region.
  int workers() const;
  // Memory for one call, aligned to 64 bytes, its content undefined; the next reserve may move it.
  Status reserve_scratch(int64_t bytes, void** scratch) noexcept;
  // The place of JIT-made code, empty at first: one for each owner (any address that is the
  // kernel's own) and key. Null when there is no memory for it.
  std::shared_ptr<const void>* cached_code(const void* owner, uint64_t key) noexcept;
  // Null where there is none.
  const Tuning* tuning() const { return tuning_.get(); }
  // For the tuner, between calls.
  void set_tuning(std::shared_ptr<const Tuning> tuning) noexcept { tuning_ = std::move(tuning); }

 private:
  Status initialise(const ContextOptions& options);
  Status read_tuning(const char* path) noexcept;

  Status status_;
  int threads_ = 1;
  Isa isa_ = Isa::kScalar;
  Status tuning_status_;
  std::shared_ptr<const Tuning> tuning_;
  HugeBuffer scratch_;
  std::map<std::pair<const void*, uint64_t>, std::shared_ptr<const void>> code_;
};

}  // namespace moeops

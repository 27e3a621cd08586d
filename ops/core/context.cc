// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/core/context.h>
#include <omp.h>

#include <algorithm>
#include <new>

#include "ops/core/tuning.h"

namespace moeops {

namespace {
// Far above any machine; keeps per-worker arithmetic from overflowing.
constexpr int kMaxThreads = 4096;
}  // namespace

Context::Context(const ContextOptions& options) noexcept {
  try {
    status_ = initialise(options);
  } catch (const std::bad_alloc&) {
    status_ = Status(StatusCode::kOutOfMemory, "no memory to read the machine's facts");
  }
  if (status_.ok() && options.tuning_cache != nullptr) {
    tuning_status_ = read_tuning(options.tuning_cache);
  }
}

Status Context::read_tuning(const char* path) noexcept {
  try {
    auto tuning = std::make_shared<Tuning>();
    MOEOPS_RETURN_IF_ERROR(Tuning::read(path, tuning.get()));
    tuning_ = std::move(tuning);
    return {};
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "no memory to read the tuning cache"};
  }
}

int64_t Context::tuned_plans() const noexcept {
  if (tuning_ == nullptr) return 0;
  return std::count_if(tuning_->plans.begin(), tuning_->plans.end(), [this](const auto& entry) {
    return entry.first.isa == isa_ && entry.first.threads == threads_;
  });
}

Status Context::initialise(const ContextOptions& options) {
  MOEOPS_RETURN_IF_ERROR(default_isa(&isa_));
  if (options.isa.has_value()) {
    if (*options.isa > machine().isa) {
      return {StatusCode::kInvalidArgument, "isa = %s, but this machine ends at %s",
              to_string(*options.isa), to_string(machine().isa)};
    }
    isa_ = *options.isa;
  }
  if (options.threads < 0 || options.threads > kMaxThreads) {
    return {StatusCode::kInvalidArgument, "threads = %d is not in [0, %d]", options.threads,
            kMaxThreads};
  }
  threads_ = options.threads > 0 ? options.threads : machine().threads;
  return {};
}

int Context::workers() const { return omp_in_parallel() ? 1 : threads_; }

Status Context::reserve_scratch(int64_t bytes, void** scratch) noexcept {
  if (bytes > scratch_.size()) {
    scratch_ = HugeBuffer();  // its content is nobody's: give it back before asking for more
    MOEOPS_RETURN_IF_ERROR(HugeBuffer::allocate(std::max(bytes, int64_t{64} << 10), &scratch_));
  }
  *scratch = scratch_.data();
  return {};
}

std::shared_ptr<const void>* Context::cached_code(const void* owner, uint64_t key) noexcept {
  try {
    return &code_[{owner, key}];
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // namespace moeops

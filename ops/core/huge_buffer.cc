// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/core/huge_buffer.h>
#include <sys/mman.h>

#include <cinttypes>

namespace moeops {

namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

void* map(int64_t bytes) {
  void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

}  // namespace

HugeBuffer::~HugeBuffer() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(size_));
}

Status HugeBuffer::allocate(int64_t bytes, HugeBuffer* buffer) noexcept {
  if (bytes < 0) {
    return {StatusCode::kInvalidArgument, "a buffer cannot have %" PRId64 " bytes", bytes};
  }
  if (bytes > INT64_MAX - kHugePage) {
    return {StatusCode::kOutOfMemory, "%" PRId64 " bytes of memory are not available", bytes};
  }
  HugeBuffer fresh;
  fresh.size_ = bytes;
  if (bytes >= kHugePage) {
    // mmap aligns to small pages only: map one huge page more and give back both ends.
    char* p = static_cast<char*>(map(bytes + kHugePage));
    if (p != nullptr) {
      const auto address = reinterpret_cast<uintptr_t>(p);
      const auto head = static_cast<int64_t>(-address % static_cast<uintptr_t>(kHugePage));
      const int64_t kept = (bytes + 4095) / 4096 * 4096;
      if (head > 0) munmap(p, static_cast<size_t>(head));
      if (kHugePage + bytes - head > kept) {
        munmap(p + head + kept, static_cast<size_t>(kHugePage + bytes - head - kept));
      }
      fresh.data_ = p + head;
      // Advice only: without huge pages everything still works.
      (void)madvise(fresh.data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
    }
  } else if (bytes > 0) {
    fresh.data_ = map(bytes);
  }
  if (bytes > 0 && fresh.data_ == nullptr) {
    return {StatusCode::kOutOfMemory, "%" PRId64 " bytes of memory are not available", bytes};
  }
  *buffer = std::move(fresh);
  return {};
}

Status HugeBuffer::map_file(int file, int64_t bytes, HugeBuffer* buffer) noexcept {
  if (bytes < 0) {
    return {StatusCode::kInvalidArgument, "a buffer cannot have %" PRId64 " bytes", bytes};
  }
  HugeBuffer fresh;
  if (bytes > 0) {
    void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ, MAP_SHARED, file, 0);
    if (p == MAP_FAILED) {
      return {StatusCode::kOutOfMemory, "%" PRId64 " bytes of a file cannot be mapped", bytes};
    }
    fresh.data_ = p;
    fresh.size_ = bytes;
    // Advice only: file systems in memory have huge pages, too.
    (void)madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  }
  *buffer = std::move(fresh);
  return {};
}

}  // namespace moeops

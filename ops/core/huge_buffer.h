// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/status.h>

#include <cstdint>
#include <utility>

namespace moeops {

// Owned, zeroed memory for weights and scratch. From 2 MiB up it starts on a huge-page boundary
// and asks for huge pages, without which streaming weights waits for the TLB; smaller ones start
// on a 4 KiB page. Pages are committed on first touch. Or the bytes of a file, read-only.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept { *this = std::move(other); }
  HugeBuffer& operator=(HugeBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  // invalid_argument when bytes < 0, out_of_memory when the system has none; *buffer is then
  // unchanged. An empty buffer has null data.
  static Status allocate(int64_t bytes, HugeBuffer* buffer) noexcept;
  // The first bytes of an open file, which has at least as many; shared with other processes and
  // paged in on first touch. Errors as above.
  static Status map_file(int file, int64_t bytes, HugeBuffer* buffer) noexcept;

  void* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace moeops

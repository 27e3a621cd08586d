// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOEOPS_ALLOCATOR_IS_TAKEN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define MOEOPS_ALLOCATOR_IS_TAKEN
#endif

namespace moeops::test {

// AddressSanitizer has the functions that are counted for itself.
#ifdef MOEOPS_ALLOCATOR_IS_TAKEN
inline constexpr bool kCountsAllocations = false;
#else
inline constexpr bool kCountsAllocations = true;
#endif

// Calls of malloc and its kin and of mmap that the process has made so far, from any thread; 0
// where they are not counted.
int64_t allocation_count();

}  // namespace moeops::test

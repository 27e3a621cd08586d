// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/status.h>

#include <new>
#include <stdexcept>

namespace moeops::ref {

// Runs a reference operator, whose vectors may throw, behind an API that does not.
template <class Body>
Status guarded(const char* op, Body body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "%s: the reference's scratch does not fit in memory", op};
  } catch (const std::length_error&) {
    return {StatusCode::kOutOfMemory, "%s: the reference's scratch does not fit in memory", op};
  }
}

}  // namespace moeops::ref

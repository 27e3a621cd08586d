// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace moeops {

enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument,  // the call's arguments contradict the operator's contract; nothing was written
  kUnsupported,      // legal, but this build or this form of the operator cannot do it
  kOutOfMemory,      // scratch or an owned buffer could not be allocated; nothing was written
  kInternal,         // a defect of the library
};

// "ok", "invalid_argument", ...: the names that case files use.
constexpr const char* to_string(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return "ok";
    case StatusCode::kInvalidArgument:
      return "invalid_argument";
    case StatusCode::kUnsupported:
      return "unsupported";
    case StatusCode::kOutOfMemory:
      return "out_of_memory";
    case StatusCode::kInternal:
      return "internal";
  }
  return "unknown";
}

// The outcome of a call. The message names the argument, its value and the bound it broke:
// "expert_ids[12,3] = 64 is not in [0, 64)". It lives inside the object (a longer one is cut), so
// that reporting an error never allocates and never throws.
class [[nodiscard]] Status {
 public:
  Status() noexcept = default;  // ok

  __attribute__((format(printf, 3, 4))) Status(StatusCode code, const char* format, ...) noexcept
      : code_(code) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(message_, sizeof(message_), format, args);
    va_end(args);
  }

  Status(const Status& other) noexcept { *this = other; }
  Status& operator=(const Status& other) noexcept {
    code_ = other.code_;
    std::strcpy(message_, other.message_);  // bounded by both buffers being of one size
    return *this;
  }

  bool ok() const noexcept { return code_ == StatusCode::kOk; }
  StatusCode code() const noexcept { return code_; }
  const char* message() const noexcept { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  char message_[252] = {'\0'};
};

}  // namespace moeops

// Hands an error to the caller; for functions that return Status.
#define MOEOPS_RETURN_IF_ERROR(expression)                                                        \
  do {                                                                                            \
    if (::moeops::Status moeops_status = (expression); !moeops_status.ok()) return moeops_status; \
  } while (0)

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

#include <cstdarg>
#include <cstdint>
#include <initializer_list>

namespace moeops {

// A size that several views of a call share. The first view that mentions it sets it, the others
// must agree; or the operator's parameters set it.
struct Dim {
  const char* name;
  int64_t value = -1;          // -1: not yet known
  const char* from = nullptr;  // the argument that set it
};

// What a view's dimension must be: a fixed size, or a Dim.
struct Extent {
  Extent(int64_t size) : fixed(size) {}  // NOLINT(google-explicit-constructor)
  Extent(Dim& d) : dim(&d) {}            // NOLINT(google-explicit-constructor)
  int64_t fixed = -1;
  Dim* dim = nullptr;
};

// Checks a call's views against its contract, before anything is read through them: presence,
// dtype, rank, sizes (never negative, no product overflows), row stride, null and misaligned data,
// and, at the end, that no output overlaps an input or another output. The first violation is
// kept; later calls do nothing, so a whole contract reads as one list.
class ArgCheck {
 public:
  using DTypes = std::initializer_list<DType>;
  using Shape = std::initializer_list<Extent>;

  explicit ArgCheck(const char* op) : op_(op) {}

  void input(const char* name, const ConstTensorView& view, DTypes dtypes, Shape shape);
  void optional_input(const char* name, const ConstTensorView& view, DTypes dtypes, Shape shape);
  void output(const char* name, const TensorView& view, DTypes dtypes, Shape shape);
  void optional_output(const char* name, const TensorView& view, DTypes dtypes, Shape shape);

  // Input that is no view (packed weights): only its overlap with outputs is checked.
  void memory(const char* name, const void* data, int64_t bytes);

  // A view that the chosen parameters leave no use for must not be given.
  void absent(const char* name, const ConstTensorView& view, const char* reason);

  // A parameter whose enumerators count from 0 to `last`. A caller may have cast anything to it, so
  // this comes before the value decides anything.
  template <class Enum>
  void choice(const char* name, Enum value, Enum last) {
    const int number = static_cast<int>(value);
    const int count = static_cast<int>(last) + 1;
    require(number >= 0 && number < count, "%s = %d is not one of its %d choices", name, number,
            count);
  }

  // Keeps the error unless `condition` holds; the message is printf's.
  __attribute__((format(printf, 3, 4))) void require(bool condition, const char* format, ...);

  // The sizes are known and legal so far: code that computes from them may run.
  bool ok() const { return status_.ok(); }
  // What was found, overlap included.
  Status finish();

 private:
  struct Range {
    const char* name;
    uintptr_t begin;
    uintptr_t end;
    bool is_output;
  };
  static constexpr int kMaxViews = 32;  // the widest operator, moe_layer, has 24

  bool check_view(const char* name, const TensorLayout& layout, const void* data, DTypes dtypes,
                  Shape shape, bool is_output);
  __attribute__((format(printf, 2, 3))) bool fail(const char* format, ...);  // returns false
  void keep(const char* format, va_list args);

  const char* op_;
  Status status_;
  int count_ = 0;
  Range ranges_[kMaxViews];
};

}  // namespace moeops

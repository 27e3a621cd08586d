// SPDX-License-Identifier: Apache-2.0
#include "ops/core/arg_check.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

namespace moeops {

namespace {

// Bytes from the first to the last element, or -1 when they do not fit in 63 bits.
int64_t byte_span(const TensorLayout& layout) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < layout.rank; ++i) {
    if (__builtin_mul_overflow(rows, layout.dim(i), &rows)) return -1;
  }
  const int64_t columns = layout.dim(layout.rank - 1);
  if (rows == 0 || columns == 0) return 0;
  int64_t elements = 0;
  int64_t bytes = 0;
  // A stride in bytes must fit even where a single row leaves no use for it: operators compute it.
  if (__builtin_mul_overflow(layout.row_stride, size_of(layout.dtype), &bytes) ||
      __builtin_mul_overflow(rows - 1, layout.row_stride, &elements) ||
      __builtin_add_overflow(elements, columns, &elements) ||
      __builtin_mul_overflow(elements, size_of(layout.dtype), &bytes)) {
    return -1;
  }
  return bytes;
}

}  // namespace

void ArgCheck::keep(const char* format, va_list args) {
  char text[sizeof(Status)];
  std::vsnprintf(text, sizeof(text), format, args);
  status_ = Status(StatusCode::kInvalidArgument, "%s: %s", op_, text);
}

bool ArgCheck::fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  keep(format, args);
  va_end(args);
  return false;
}

void ArgCheck::require(bool condition, const char* format, ...) {
  if (condition || !ok()) return;
  va_list args;
  va_start(args, format);
  keep(format, args);
  va_end(args);
}

bool ArgCheck::check_view(const char* name, const TensorLayout& layout, const void* data,
                          DTypes dtypes, Shape shape, bool is_output) {
  if (!layout.present()) return fail("%s is missing", name);

  bool known = false;
  for (DType dtype : dtypes) known = known || dtype == layout.dtype;
  if (!known)
    return fail("%s has dtype %s, which is not legal here", name, to_string(layout.dtype));

  if (layout.rank != static_cast<int>(shape.size())) {
    return fail("%s has %d dimensions, expected %d", name, layout.rank,
                static_cast<int>(shape.size()));
  }
  int i = 0;
  for (const Extent& extent : shape) {
    const int64_t size = layout.dim(i);
    if (size < 0) return fail("%s.shape[%d] = %" PRId64 " is negative", name, i, size);
    if (extent.dim == nullptr) {
      if (size != extent.fixed) {
        return fail("%s.shape[%d] = %" PRId64 ", expected %" PRId64, name, i, size, extent.fixed);
      }
    } else if (extent.dim->value < 0) {
      extent.dim->value = size;
      extent.dim->from = name;
    } else if (size != extent.dim->value) {
      return fail("%s.shape[%d] = %" PRId64 ", expected %s = %" PRId64 " (from %s)", name, i, size,
                  extent.dim->name, extent.dim->value, extent.dim->from);
    }
    ++i;
  }

  if (layout.row_stride < layout.columns()) {
    return fail("%s.row_stride = %" PRId64 " is less than a row of %" PRId64, name,
                layout.row_stride, layout.columns());
  }
  const int64_t bytes = byte_span(layout);
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (bytes < 0 || begin + static_cast<uint64_t>(bytes) < begin) {
    return fail("%s: the product of its sizes overflows", name);
  }
  if (bytes == 0) return true;
  if (data == nullptr) return fail("%s.data is null", name);
  if (begin % static_cast<uintptr_t>(size_of(layout.dtype)) != 0) {
    return fail("%s.data is not aligned to its %s elements", name, to_string(layout.dtype));
  }
  ranges_[count_++] = {name, begin, begin + static_cast<uintptr_t>(bytes), is_output};
  return true;
}

void ArgCheck::input(const char* name, const ConstTensorView& view, DTypes dtypes, Shape shape) {
  if (ok()) check_view(name, view, view.data, dtypes, shape, false);
}

void ArgCheck::optional_input(const char* name, const ConstTensorView& view, DTypes dtypes,
                              Shape shape) {
  if (view.present()) input(name, view, dtypes, shape);
}

void ArgCheck::output(const char* name, const TensorView& view, DTypes dtypes, Shape shape) {
  if (ok()) check_view(name, view, view.data, dtypes, shape, true);
}

void ArgCheck::optional_output(const char* name, const TensorView& view, DTypes dtypes,
                               Shape shape) {
  if (view.present()) output(name, view, dtypes, shape);
}

void ArgCheck::memory(const char* name, const void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (ok() && bytes > 0)
    ranges_[count_++] = {name, begin, begin + static_cast<uintptr_t>(bytes), false};
}

void ArgCheck::absent(const char* name, const ConstTensorView& view, const char* reason) {
  if (ok() && view.present()) fail("%s is given, but %s", name, reason);
}

Status ArgCheck::finish() {
  for (int i = 0; ok() && i < count_; ++i) {
    if (!ranges_[i].is_output) continue;
    for (int j = 0; j < count_; ++j) {
      if (j == i || ranges_[j].end <= ranges_[i].begin || ranges_[i].end <= ranges_[j].begin) {
        continue;
      }
      fail("output %s overlaps %s %s", ranges_[i].name, ranges_[j].is_output ? "output" : "input",
           ranges_[j].name);
      break;
    }
  }
  return status_;
}

}  // namespace moeops

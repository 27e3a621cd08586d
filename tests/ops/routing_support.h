// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the tests of the routing operators share: random problems in guarded memory, and the
// comparison of an operator with its reference, which they match bit for bit.

#include <gtest/gtest.h>
#include <moeops/ops/core/context.h>
#include <moeops/ops/core/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "ops/core/team.h"
#include "ops/permute/row_kernels.h"
#include "tests/support/allocation_count.h"
#include "tests/support/draw.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/seed.h"

namespace moeops::test {

// The ISAs that have row kernels of their own.
inline std::vector<Isa> routing_isas() {
  std::vector<Isa> isas;
  for (int i = 0; i < routing_internal::kRowKernelsCount; ++i) {
    const Isa isa = routing_internal::kRowKernels[i]->isa;
    if (isa <= machine().isa) isas.push_back(isa);
  }
  return isas;
}

// While it lives, small calls take the paths of large ones.
struct LargeCallPaths {
  explicit LargeCallPaths(bool split = true, bool stream = true) {
    split_small_calls(split);
    stream_small_outputs(stream);
  }
  ~LargeCallPaths() {
    split_small_calls(false);
    stream_small_outputs(false);
  }
};

// One of each ISA and number of workers, made once: their scratch is then of all sizes.
inline Context& context(Isa isa, int threads) {
  static std::vector<std::pair<std::pair<Isa, int>, std::unique_ptr<Context>>> all;
  for (auto& [key, ctx] : all) {
    if (key == std::pair(isa, threads)) return *ctx;
  }
  all.emplace_back(std::pair(isa, threads),
                   std::make_unique<Context>(ContextOptions{.threads = threads, .isa = isa}));
  return *all.back().second;
}

inline size_t span_bytes(const TensorLayout& v) {
  if (v.rows() == 0 || v.columns() == 0) return 0;
  return static_cast<size_t>(((v.rows() - 1) * v.row_stride + v.columns()) * size_of(v.dtype));
}

// Draws problems, and owns their memory: between guard pages, against either of them.
class RoutingDraw : public Draw {
 public:
  using Draw::Draw;

  bool percent(int64_t p) { return between(1, 100) <= p; }

  // Columns around the vectors' widths, the blocks that sums and copies are cut in, and beyond.
  int64_t columns() { return percent(80) ? between(0, 70) : between(71, 700); }

  TensorView view(DType dtype, std::initializer_list<int64_t> shape) {
    TensorLayout layout(dtype, shape);
    if (layout.rank > 1 && percent(50)) layout.row_stride += between(1, 9);
    buffers_.push_back(std::make_unique<GuardedBuffer>(
        span_bytes(layout),
        percent(50) ? GuardedBuffer::Against::kFront : GuardedBuffer::Against::kBack));
    return {buffers_.back()->as<char>(), layout};
  }

  // Normal values, and now and then what is special; all of the buffer, gaps included.
  TensorView floats(DType dtype, std::initializer_list<int64_t> shape, int special_percent = 2) {
    const TensorView v = view(dtype, shape);
    const auto count = static_cast<int64_t>(span_bytes(v)) / size_of(dtype);
    for (int64_t i = 0; i < count; ++i) {
      float value = normal();
      if (percent(special_percent)) {
        value = of({std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY, 0.0f, -0.0f,
                    1e-40f, -1e-40f, 3e38f, 70000.0f});
      }
      set(v, i, value);
    }
    return v;
  }

  TensorView integers(DType dtype, std::initializer_list<int64_t> shape, int64_t low,
                      int64_t high) {
    const TensorView v = view(dtype, shape);
    const auto count = static_cast<int64_t>(span_bytes(v)) / size_of(dtype);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t value = between(low, high);
      std::memcpy(static_cast<char*>(v.data) + i * size_of(dtype), &value,
                  static_cast<size_t>(size_of(dtype)));
    }
    return v;
  }

  static void set(const TensorView& v, int64_t element, float value) {
    if (v.dtype == DType::kF32) static_cast<float*>(v.data)[element] = value;
    if (v.dtype == DType::kBf16) static_cast<bf16*>(v.data)[element] = to_bf16(value);
    if (v.dtype == DType::kF16) static_cast<f16*>(v.data)[element] = to_f16(value);
  }

 private:
  std::vector<std::unique_ptr<GuardedBuffer>> buffers_;
};

// Element `i` of the memory as text; the NaNs of a dtype are all alike.
inline bool same_element(DType dtype, const void* a, const void* b, int64_t i) {
  const int64_t size = size_of(dtype);
  const char* pa = static_cast<const char*>(a) + i * size;
  const char* pb = static_cast<const char*>(b) + i * size;
  if (std::memcmp(pa, pb, static_cast<size_t>(size)) == 0) return true;
  const auto value = [&](const char* p) {
    if (dtype == DType::kF32) return *reinterpret_cast<const float*>(p);
    if (dtype == DType::kBf16) return to_f32(*reinterpret_cast<const bf16*>(p));
    if (dtype == DType::kF16) return to_f32(*reinterpret_cast<const f16*>(p));
    return 0.0f;
  };
  return std::isnan(value(pa)) && std::isnan(value(pb));
}

// No result of a test by accident, and no NaN.
inline constexpr int kBefore = 0x55;

// Runs the reference, then the operator on every ISA with two numbers of workers. Status, message
// and every byte of the outputs must agree, be they the outputs of a call that succeeds or of one
// that is refused.
template <class Args, class Reference, class Operator>
void expect_like_reference(const Args& args, const std::vector<TensorView Args::*>& outputs,
                           RoutingDraw& draw, Reference reference, Operator op) {
  const auto fill = [&] {
    for (const auto output : outputs) {
      const TensorView& v = args.*output;
      if (v.present() && v.data != nullptr) std::memset(v.data, kBefore, span_bytes(v));
    }
  };
  fill();
  const Status expected = reference(args);
  std::vector<std::vector<char>> values;
  for (const auto output : outputs) {
    const TensorView& v = args.*output;
    const auto* data = static_cast<const char*>(v.data);
    values.emplace_back(data, data + (v.present() ? span_bytes(v) : 0));
  }
  for (const Isa isa : routing_isas()) {
    for (const int threads : {1, draw.of({2, 3, 7})}) {
      const LargeCallPaths large(threads > 1, draw.percent(50));
      const std::string where = std::string(to_string(isa)) + ", " + std::to_string(threads);
      fill();
      const Status status = op(context(isa, threads), args);
      ASSERT_EQ(to_string(status.code()), std::string(to_string(expected.code())))
          << where << ": " << status.message();
      ASSERT_STREQ(status.message(), expected.message()) << where;
      for (size_t o = 0; o < outputs.size(); ++o) {
        const TensorView& v = args.*outputs[o];
        if (values[o].empty() || std::memcmp(v.data, values[o].data(), values[o].size()) == 0) {
          continue;
        }
        const auto count = static_cast<int64_t>(values[o].size()) / size_of(v.dtype);
        for (int64_t i = 0; i < count; ++i) {
          ASSERT_TRUE(same_element(v.dtype, v.data, values[o].data(), i))
              << where << ": output " << o << " differs at element " << i << " of " << count;
        }
      }
    }
  }
}

// Every call after the first allocates nothing, on whatever thread.
template <class Call>
void expect_no_allocation(Call call) {
  ASSERT_TRUE(call().ok());
  for (int i = 0; i < 20; ++i) {
    const int64_t before = allocation_count();
    const Status status = call();
    const int64_t after = allocation_count();
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(after, before);
  }
}

}  // namespace moeops::test

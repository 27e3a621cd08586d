// SPDX-License-Identifier: Apache-2.0
#include "bench/limits/limits.h"

#include <gtest/gtest.h>
#include <moeops/ops/core/machine.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <ostream>
#include <string>
#include <vector>

#include "bench/limits/kernels.h"

namespace moeops {
namespace {

using limits::DotKernel;
using limits::kBlock;
using limits::kCopyUnit;
using limits::Kernels;
using limits::kStreams;

struct Entry {
  const char* name;
  Isa isa;
  Kernels (*get)();
};

void PrintTo(const Entry& entry, std::ostream* out) { *out << entry.name; }

class LimitsKernels : public testing::TestWithParam<Entry> {
 protected:
  const Kernels kernels_ = GetParam().get();
};

TEST_P(LimitsKernels, DotsDoTheOperations) {
  const auto check = [](const char* name, const DotKernel& kernel) {
    if (kernel.run == nullptr) return;
    for (int64_t steps : {0, 1, 7, 1000}) {
      EXPECT_EQ(kernel.run(steps, 3, -2), static_cast<double>(-6 * steps * kernel.multiply_adds))
          << name << ", steps = " << steps;
    }
  };
  check("f32", kernels_.f32);
  check("bf16", kernels_.bf16);
  check("s8", kernels_.s8);
}

TEST_P(LimitsKernels, ReadsSeeEveryWord) {
  if (kernels_.memory.read == nullptr) return;  // this rung uses those of a lower one
  HugeBuffer buffer;
  constexpr int64_t kBytes = 2 * kStreams * kBlock;
  ASSERT_TRUE(HugeBuffer::allocate(kBytes, &buffer).ok());
  auto* words = static_cast<uint64_t*>(buffer.data());
  for (int64_t i = 0; i < kBytes / 8; ++i) {
    const uint64_t mark = uint64_t{1} << (i % 64);
    words[i] = mark;
    EXPECT_EQ(kernels_.memory.read(words, kBytes), mark) << "word " << i;
    words[i] = 0;
  }
}

TEST_P(LimitsKernels, CopiesWriteWhatWasRead) {
  if (kernels_.memory.copy == nullptr) return;  // this rung uses those of a lower one
  constexpr int64_t kWords = kCopyUnit / 8;
  constexpr int kSteps = 3;
  struct Mix {
    int reads, writes;
  };
  for (const auto [reads, writes] : {Mix{1, 1}, Mix{1, 8}, Mix{2, 5}, Mix{3, 2}, Mix{8, 1}}) {
    const int64_t in = kSteps * reads * kWords;
    const int64_t out = kSteps * writes * kWords;
    HugeBuffer buffer;
    ASSERT_TRUE(HugeBuffer::allocate((in + out) * 8, &buffer).ok());
    auto* source = static_cast<uint64_t*>(buffer.data());
    uint64_t* target = source + in;
    for (int64_t i = 0; i < in; ++i) source[i] = static_cast<uint64_t>(i) + 1;

    uint64_t uncopied = 0;
    std::vector<uint64_t> expected;
    for (int64_t step = 0; step < kSteps; ++step) {
      for (int unit = 0; unit < std::max(reads, writes); ++unit) {
        const uint64_t* from = source + (step * reads + unit % reads) * kWords;
        if (unit < writes) {
          expected.insert(expected.end(), from, from + kWords);
        } else {
          for (int64_t i = 0; i < kWords; ++i) uncopied |= from[i];
        }
      }
    }
    for (auto copy : {kernels_.memory.copy, kernels_.memory.copy_non_temporal}) {
      std::fill_n(target, out, uint64_t{0});
      EXPECT_EQ(copy(source, target, kSteps, reads, writes), uncopied);
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), target))
          << reads << " reads, " << writes << " writes";
    }
  }
}

#define MOEOPS_LIMITS_KERNELS(suffix, isa) Entry{#suffix, isa, limits::kernels_##suffix},
const Entry kEntries[] = {
#include "bench/limits/kernels.inc"
};
#undef MOEOPS_LIMITS_KERNELS

std::vector<Entry> entries_of_this_machine() {
  std::vector<Entry> entries;
  std::copy_if(std::begin(kEntries), std::end(kEntries), std::back_inserter(entries),
               [](const Entry& entry) { return entry.isa <= machine().isa; });
  return entries;
}

INSTANTIATE_TEST_SUITE_P(All, LimitsKernels, testing::ValuesIn(entries_of_this_machine()),
                         [](const auto& info) { return std::string(info.param.name); });

// The list is best first, and ends with what runs anywhere: f32 and memory have no gap to fill.
TEST(LimitsKernelList, IsOrderedAndEndsComplete) {
  for (size_t i = 1; i < std::size(kEntries); ++i) {
    EXPECT_LT(kEntries[i].isa, kEntries[i - 1].isa) << kEntries[i].name;
  }
  const Entry& last = *std::rbegin(kEntries);
  EXPECT_EQ(last.isa, Isa::kScalar);
  EXPECT_NE(last.get().f32.run, nullptr);
  EXPECT_NE(last.get().memory.read, nullptr);
}

TEST(LimitsMeter, MeasuresPositiveLimits) {
  for (int threads : {1, 2}) {
    LimitsMeter meter;
    // Small, as the figures do not matter here.
    const Status status = LimitsMeter::create(threads, &meter, 1 << 24);
    ASSERT_TRUE(status.ok()) << status.message();
    const Limits limits = meter.measure();
    EXPECT_GT(limits.dot_peak_gops.f32, 0);
    EXPECT_GT(limits.dot_peak_gops.bf16, 0);
    EXPECT_GT(limits.dot_peak_gops.s8, 0);
    EXPECT_GT(limits.vector_dot_peak_gops.f32, 0);
    EXPECT_GT(limits.vector_dot_peak_gops.bf16, 0);
    EXPECT_GT(limits.vector_dot_peak_gops.s8, 0);
    EXPECT_GT(limits.read_gbps, 0);
    EXPECT_GT(limits.copy_gbps, 0);
    EXPECT_GT(meter.copy_gbps(1, 8), 0);
    EXPECT_GT(meter.copy_gbps(128, 128), 0);
  }
}

TEST(LimitsMeter, RefusesImpossibleTeams) {
  LimitsMeter meter;
  Status status = LimitsMeter::create(0, &meter);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("threads = 0"), std::string::npos);
  status = LimitsMeter::create(INT32_MAX, &meter);
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory) << status.message();
}

}  // namespace
}  // namespace moeops

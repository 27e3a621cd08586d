// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/core/machine.h>
#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <optional>
#include <string>

namespace moeops {
namespace {

TEST(Isa, NamesRoundTrip) {
  for (int i = 0; i < kIsaCount; ++i) {
    Isa isa = i == 0 ? Isa::kAvx512Bf16 : Isa::kScalar;
    EXPECT_TRUE(parse_isa(to_string(static_cast<Isa>(i)), &isa)) << i;
    EXPECT_EQ(static_cast<int>(isa), i);
  }
}

TEST(Isa, UnknownNamesAreRefused) {
  for (const char* name : {"", "AVX2", "avx", "avx512_", "avx512_vnni ", "native"}) {
    Isa isa = Isa::kAvx512;
    EXPECT_FALSE(parse_isa(name, &isa)) << name;
    EXPECT_EQ(isa, Isa::kAvx512) << name;
  }
}

// Sets MOEOPS_ISA for one test, whatever the tests themselves were started with.
class DefaultIsa : public testing::Test {
 protected:
  void SetUp() override {
    if (const char* value = std::getenv("MOEOPS_ISA")) started_with_ = value;
  }
  void TearDown() override {
    if (started_with_.has_value()) {
      setenv("MOEOPS_ISA", started_with_->c_str(), 1);
    } else {
      unsetenv("MOEOPS_ISA");
    }
  }

 private:
  std::optional<std::string> started_with_;
};

TEST_F(DefaultIsa, IsTheMachinesWithoutTheVariable) {
  Isa isa{};
  unsetenv("MOEOPS_ISA");
  ASSERT_TRUE(default_isa(&isa).ok());
  EXPECT_EQ(isa, machine().isa);
  setenv("MOEOPS_ISA", "", 1);
  ASSERT_TRUE(default_isa(&isa).ok());
  EXPECT_EQ(isa, machine().isa);
}

TEST_F(DefaultIsa, IsLoweredButNeverRaised) {
  for (int i = 0; i < kIsaCount; ++i) {
    setenv("MOEOPS_ISA", to_string(static_cast<Isa>(i)), 1);
    Isa isa{};
    ASSERT_TRUE(default_isa(&isa).ok());
    EXPECT_EQ(isa, std::min(static_cast<Isa>(i), machine().isa)) << i;
  }
}

TEST_F(DefaultIsa, UnknownNameIsAnErrorThatListsTheChoices) {
  setenv("MOEOPS_ISA", "avx9", 1);
  Isa isa = Isa::kAvx512;
  const Status status = default_isa(&isa);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(isa, Isa::kAvx512);
  const std::string message = status.message();
  EXPECT_NE(message.find("MOEOPS_ISA = 'avx9'"), std::string::npos) << message;
  for (int i = 0; i < kIsaCount; ++i) {
    EXPECT_NE(message.find(to_string(static_cast<Isa>(i))), std::string::npos) << message;
  }
}

// The kernel lists a vector extension only where it also saves its registers.
TEST(Machine, IsaAgreesWithTheKernelsFlags) {
#if defined(__x86_64__)
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line;
  while (std::getline(cpuinfo, line) && !line.starts_with("flags")) {
  }
  ASSERT_TRUE(cpuinfo) << "/proc/cpuinfo lists no flags";
  const std::string flags = line.substr(line.find(':') + 1) + " ";
  const auto has = [&](std::initializer_list<const char*> names) {
    for (const char* name : names) {
      if (flags.find(std::string(" ") + name + " ") == std::string::npos) return false;
    }
    return true;
  };
  Isa expected = Isa::kScalar;
  if (has({"avx2", "fma", "f16c"})) {
    expected = Isa::kAvx2;
    if (has({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) {
      expected = Isa::kAvx512;
      if (has({"avx512_vnni"})) {
        expected = Isa::kAvx512Vnni;
        if (has({"avx512_bf16"})) {
          expected = Isa::kAvx512Bf16;
          // Refused, though listed, only by a sandbox that filters the call that asks for them.
          if (has({"amx_tile", "amx_int8", "amx_bf16"})) expected = Isa::kAmx;
        }
      }
    }
  }
  EXPECT_STREQ(to_string(machine().isa), to_string(expected));
#else
  EXPECT_EQ(machine().isa, Isa::kScalar);
#endif
}

TEST(Machine, FactsAreSane) {
  const Machine& m = machine();
  EXPECT_FALSE(m.cpu.empty());
  EXPECT_EQ(m.cpu.find('\n'), std::string::npos);
  EXPECT_GE(m.threads, 1);
  EXPECT_LE(m.threads, m.cores);
  for (int64_t bytes : {m.l1d_bytes, m.l2_bytes, m.l3_bytes}) {
    EXPECT_TRUE(bytes == 0 || (bytes >= 4096 && bytes % 1024 == 0)) << bytes;
  }
  EXPECT_EQ(&m, &machine());
}

// In a fresh process (the style "threadsafe"), so that machine() is not read yet.
TEST(MachineDeathTest, CoresFollowTheAffinity) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(static_cast<size_t>(sched_getcpu()), &one);
        if (sched_setaffinity(0, sizeof(one), &one) != 0) std::exit(99);
        std::exit(machine().cores * 10 + machine().threads);
      },
      testing::ExitedWithCode(11), "");
}

// OpenMP then binds the process's first thread as soon as it is loaded. Under Clang the process has
// two OpenMPs: OpenBLAS brings libgomp, which binds the thread before libomp counts its places.
#ifndef __clang__
TEST(MachineDeathTest, CoresAreThoseOfTheProcessWhereThreadsAreBound) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const int cores = machine().cores;
  ASSERT_EQ(setenv("OMP_PROC_BIND", "true", 1), 0);
  EXPECT_EXIT(std::exit(machine().cores % 256), testing::ExitedWithCode(cores % 256), "");
  ASSERT_EQ(unsetenv("OMP_PROC_BIND"), 0);
}
#endif

// Cgroup file systems made of plain files.
class CgroupCpuLimit : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "moeops_cgroup_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ + "/" + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }
  int limit(const std::string& proc_cgroup) const { return cgroup_cpu_limit(proc_cgroup, root_); }

 private:
  std::string root_;
};

TEST_F(CgroupCpuLimit, NoneWhereNothingSaysSo) {
  EXPECT_EQ(limit(""), 0);
  EXPECT_EQ(limit("0::/\n"), 0);
  EXPECT_EQ(limit("no colons\n0:\n1:cpu\n"), 0);
  write("a/cpu.max", "max 100000");
  EXPECT_EQ(limit("0::/a\n"), 0);
}

TEST_F(CgroupCpuLimit, V2RoundsUp) {
  write("whole/cpu.max", "300000 100000");
  write("more/cpu.max", "300001 100000");
  write("less/cpu.max", "1000 100000");
  EXPECT_EQ(limit("0::/whole\n"), 3);
  EXPECT_EQ(limit("0::/more\n"), 4);
  EXPECT_EQ(limit("0::/less\n"), 1);
}

TEST_F(CgroupCpuLimit, V2TightestAncestorCounts) {
  write("cpu.max", "800000 100000");
  write("a/cpu.max", "200000 100000");
  write("a/b/cpu.max", "max 100000");
  write("a/b/c/cpu.max", "400000 100000");
  write("d/cpu.max", "900000 100000");
  EXPECT_EQ(limit("0::/a/b/c\n"), 2);
  EXPECT_EQ(limit("0::/a/b\n"), 2);
  EXPECT_EQ(limit("0::/d\n"), 8);
  EXPECT_EQ(limit("0::/\n"), 8);
}

// As in a container that sees its own group as the root and is told the host's path.
TEST_F(CgroupCpuLimit, PathOutsideTheMountLeadsToItsRoot) {
  write("cpu.max", "500000 100000");
  EXPECT_EQ(limit("0::/system.slice/docker-0123.scope\n"), 5);
}

TEST_F(CgroupCpuLimit, V1) {
  write("cpu,cpuacct/docker/x/cpu.cfs_quota_us", "250000");
  write("cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000");
  write("cpu,cpuacct/docker/cpu.cfs_quota_us", "-1");
  write("cpu,cpuacct/docker/cpu.cfs_period_us", "100000");
  write("cpu/alone/cpu.cfs_quota_us", "50000");
  write("cpu/alone/cpu.cfs_period_us", "25000");
  EXPECT_EQ(limit("9:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/docker/x\n"), 3);
  EXPECT_EQ(limit("4:cpu,cpuacct:/docker\n"), 0);
  EXPECT_EQ(limit("1:cpu:/alone\n"), 2);
  EXPECT_EQ(limit("3:cpuset:/alone\n2:cpuacct:/alone\n"), 0);
}

TEST_F(CgroupCpuLimit, NonsenseIsNoLimit) {
  int i = 0;
  for (const char* text : {"", "100000", "0 100000", "-5 100000", "100000 0", "100000 -1", "a b",
                           "99999999999999999999 1"}) {
    const std::string group(1, static_cast<char>('a' + i++));
    write(group + "/cpu.max", text);
    EXPECT_EQ(limit("0::/" + group + "\n"), 0) << text;
  }
  write("vast/cpu.max", "9223372036854775807 1");
  EXPECT_EQ(limit("0::/vast\n"), INT32_MAX);
}

}  // namespace
}  // namespace moeops

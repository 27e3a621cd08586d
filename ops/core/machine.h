// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/status.h>

#include <cstdint>
#include <string>

namespace moeops {

// The instruction-set ladder: each rung includes the ones below it.
enum class Isa : int {
  kScalar = 0,
  kAvx2,    // with FMA and F16C
  kAvx512,  // F, BW, DQ, VL
  kAvx512Vnni,
  kAvx512Bf16,
  kAmx,  // TILE, INT8, BF16
};
inline constexpr int kIsaCount = 6;

// "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"
const char* to_string(Isa isa);
// False (and *isa untouched) when `name` is none of the above.
bool parse_isa(const char* name, Isa* isa);

struct Machine {
  std::string cpu;     // the processor's name
  uint32_t signature;  // its family, model and stepping, as CPUID packs them; 0 where unknown
  Isa isa;             // the highest rung that processor and operating system support
  int cores;           // processors that the process may run on (affinity)
  int threads;         // cores, lowered to the cgroup's CPU quota (rounded up), at least 1
  int64_t l1d_bytes;   // per core; 0 where unknown
  int64_t l2_bytes;
  int64_t l3_bytes;
};

// Read once, at the first call; thread-safe. Where the processor has AMX, it also asks the kernel
// to let the process use the tile registers: threads started later have that permission, and so
// have those that run.
const Machine& machine();

// The rung to use when the caller does not say: machine().isa, lowered (never raised) by the
// environment variable MOEOPS_ISA, which is read at every call; empty is as good as unset, an
// unknown name is an error.
Status default_isa(Isa* isa);

// CPUs that the cgroup's quota allows, rounded up; 0 where there is no limit. `proc_cgroup` is the
// text of /proc/self/cgroup; `root` is where the cgroup file systems are mounted. Exposed for
// tests.
int cgroup_cpu_limit(const std::string& proc_cgroup, const std::string& root);

}  // namespace moeops

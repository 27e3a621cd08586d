// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/core/machine.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <omp.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

namespace moeops {

namespace {

constexpr const char* kIsaNames[kIsaCount] = {"scalar",      "avx2",        "avx512",
                                              "avx512_vnni", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Clang 14's __builtin_cpu_supports does not know f16c. This bit alone says nothing of the
// operating system; avx2, asked for along with it, does.
bool cpu_has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

// The built-in of GCC 12 and Clang 14 has no name for AMX.
bool cpu_has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25,
                     kAll = kBf16 | kTile | kInt8;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAll) == kAll;
}

// Whether the kernel saves the tile registers (XCR0) and lets this process use them. They are off
// until asked for, because each thread's signal frame grows by their 8 KiB.
bool system_allows_amx() {
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18, kBoth = kTileConfig | kTileData;
  unsigned low = 0, high = 0;
  // XGETBV by name needs a compile flag that this file must not have. avx2, found before, says that
  // the kernel has switched the instruction on.
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return (low & kBoth) == kBoth &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

uint32_t cpu_signature() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 ? eax : 0;
}

Isa detect_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !cpu_has_f16c()) {
    return Isa::kScalar;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Vnni;
  return cpu_has_amx() && system_allows_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
uint32_t cpu_signature() { return 0; }
Isa detect_isa() { return Isa::kScalar; }
#endif

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string cpu_name() {
  std::istringstream cpuinfo(read_file("/proc/cpuinfo"));
  for (std::string line; std::getline(cpuinfo, line);) {
    const size_t value = line.find(": ");
    if (line.starts_with("model name") && value != std::string::npos) {
      return line.substr(value + 2);
    }
  }
  return "unknown";
}

// The data or unified cache of a level as the kernel sees it ("48K"); 0 where it does not say.
int64_t sysfs_cache_bytes(int level) {
  for (int index = 0;; ++index) {
    const std::string cache =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::istringstream level_text(read_file(cache + "level"));
    int this_level = 0;
    if (!(level_text >> this_level)) return 0;
    if (this_level != level || read_file(cache + "type").starts_with("Instruction")) continue;
    std::istringstream size_text(read_file(cache + "size"));
    int64_t size = 0;
    char unit = ' ';
    size_text >> size >> unit;
    return size * (unit == 'K' ? int64_t{1} << 10 : unit == 'M' ? int64_t{1} << 20 : 1);
  }
}

int64_t cache_bytes(int level, int sysconf_name) {
  const long bytes = sysconf(sysconf_name);
  return bytes > 0 ? bytes : sysfs_cache_bytes(level);
}

int affinity_cpus() {
  // The kernel rejects sets smaller than its own, whose size it does not tell: grow until it fits.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<size_t>(cpus));
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(cpus));
    const bool fits = sched_getaffinity(0, bytes, set) == 0;
    const bool too_small = !fits && errno == EINVAL;
    const int count = fits ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (fits) return std::max(count, 1);
    if (!too_small) break;
  }
  return 1;
}

// OMP_PROC_BIND ties this thread to one place; its team's threads go to the others.
int process_cpus() {
  const int places = omp_get_proc_bind() == omp_proc_bind_false ? 0 : omp_get_num_places();
  int cpus = 0;
  for (int place = 0; place < places; ++place) cpus += omp_get_place_num_procs(place);
  return cpus > 0 ? cpus : affinity_cpus();
}

// CPUs of one group: v2 says "QUOTA PERIOD", where QUOTA may be "max"; v1 has a file for each,
// where QUOTA may be -1. 0: no limit here.
int64_t group_cpu_limit(const std::string& group) {
  std::istringstream text(read_file(group + "/cpu.max") + read_file(group + "/cpu.cfs_quota_us") +
                          read_file(group + "/cpu.cfs_period_us"));
  int64_t quota = 0;
  int64_t period = 0;
  if (!(text >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return (quota - 1) / period + 1;
}

// The least of the limits of `path` below `mount` and of all groups above it. Inside a container,
// `path` may be the host's and lead nowhere; the container's own group is then the mount itself.
int64_t tightest_cpu_limit(const std::string& mount, std::string path) {
  int64_t tightest = 0;
  for (;;) {
    const int64_t limit = group_cpu_limit(mount + path);
    if (limit > 0 && (tightest == 0 || limit < tightest)) tightest = limit;
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return tightest;
    path.resize(slash);
  }
}

Machine read_machine() {
  Machine m;
  m.cpu = cpu_name();
  m.signature = cpu_signature();
  m.isa = detect_isa();
  m.cores = process_cpus();
  const int limit = cgroup_cpu_limit(read_file("/proc/self/cgroup"), "/sys/fs/cgroup");
  m.threads = limit > 0 ? std::min(limit, m.cores) : m.cores;
  m.l1d_bytes = cache_bytes(1, _SC_LEVEL1_DCACHE_SIZE);
  m.l2_bytes = cache_bytes(2, _SC_LEVEL2_CACHE_SIZE);
  m.l3_bytes = cache_bytes(3, _SC_LEVEL3_CACHE_SIZE);
  return m;
}

}  // namespace

const char* to_string(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(kIsaNames[i], name) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

const Machine& machine() {
  static const Machine the_machine = read_machine();
  return the_machine;
}

Status default_isa(Isa* isa) {
  Isa ceiling = machine().isa;
  const char* name = std::getenv("MOEOPS_ISA");
  if (name != nullptr && name[0] != '\0' && !parse_isa(name, &ceiling)) {
    return {StatusCode::kInvalidArgument,
            "MOEOPS_ISA = '%s' is none of scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx",
            name};
  }
  *isa = std::min(ceiling, machine().isa);
  return {};
}

int cgroup_cpu_limit(const std::string& proc_cgroup, const std::string& root) {
  int64_t tightest = 0;
  std::istringstream lines(proc_cgroup);
  for (std::string line; std::getline(lines, line);) {  // "hierarchy:controllers:path"
    const size_t first = line.find(':');
    if (first == std::string::npos) continue;
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);

    std::string mount;
    if (controllers.empty()) {  // v2; beside v1 hierarchies it has no CPU controller
      mount = root;
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      mount = root + "/" + controllers;
    } else {
      continue;
    }
    const int64_t limit = tightest_cpu_limit(mount, path);
    if (limit > 0 && (tightest == 0 || limit < tightest)) tightest = limit;
  }
  return static_cast<int>(std::min<int64_t>(tightest, INT32_MAX));
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

namespace moeops::test {

// The seed of round `round` of a property test. MOEOPS_TEST_SEED, which every failure names,
// replays that round alone (all rounds then use it).
inline uint64_t seed_of(uint64_t round) {
  const char* replay = std::getenv("MOEOPS_TEST_SEED");
  return replay != nullptr ? std::strtoull(replay, nullptr, 10) : 1000 + round;
}

inline std::string replay_hint(uint64_t seed) {
  return "replay with MOEOPS_TEST_SEED=" + std::to_string(seed);
}

}  // namespace moeops::test

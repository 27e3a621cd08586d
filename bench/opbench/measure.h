// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <istream>
#include <string>
#include <vector>

#include "bench/opbench/operators.h"
#include "bench/opbench/result.h"

namespace moeops::bench {

// What was measured of one implementation on one load, in one or more visits.
struct Measured {
  std::string wrong;                        // not empty: nothing was timed
  std::vector<double> times;                // seconds
  double worst_of_neighbours = 0;           // see Result
  double stolen = 0;                        // seconds, likewise
  bool steady = true;                       // the limits around every visit agreed
  std::vector<std::vector<double>> limits;  // those readings, all of one length
  std::vector<std::string> explain;

  double limit(size_t i) const;  // the mean of the i-th
};

double seconds_now();
int64_t available_memory();
// The time of all CPUs, since the machine was started, that a hypervisor gave to others while there
// was work for them here; in steps of a hundredth of a second. 0 where nobody says.
double stolen_seconds();
double stolen_seconds_of(std::istream& proc_stat);

// As many experts as memory holds, padding included, with room for everything else.
int64_t experts_that_fit(int64_t expert_bytes);
// What to say of a problem that was cut to them; empty when it was not.
std::string note_of_experts(int64_t used, const Problem& problem);

// What cold data has to exceed, in bytes, not to be in a cache when it comes up again.
int64_t cold_bytes();

// Half of the repetitions (the other half comes on the way back from the last implementation),
// between two readings of the limits; again when any of these disagree by more than 10%, three
// times at most. timed_call() makes one call and returns the seconds it took.
void measure(const Options& options, const std::function<std::vector<double>()>& read_limits,
             const std::function<double()>& timed_call, Measured& measured);

// Visits the implementations 0 to count - 1 forth and back (A B, B A): a machine that slows down
// meanwhile slows all alike.
void visit_forth_and_back(size_t count,
                          const std::function<void(size_t implementation, bool forth)>& visit);

// The figures that do not depend on the operator: times and steadiness.
void fill_times(const Measured& measured, Result& result);

// The options of a repro that every operator has.
std::string common_repro(const Options& options, const Result& result);

// The ISA that the operators run with.
Isa isa_of(const Options& options);

}  // namespace moeops::bench

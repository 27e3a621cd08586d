// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <new>

#include "bench/opbench/context.h"
#include "bench/opbench/measure.h"
#include "bench/opbench/operators.h"
#include "bench/opbench/tune.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/write_file.h"

namespace moeops::bench {

namespace {

using tools::Error;

enum ExitStatus { kFine = 0, kMissed = 1, kUsage = 2, kRegression = 3 };

struct Arguments {
  std::vector<std::string> ops;
  std::string problem = "qwen3-30b-a3b";
  std::string model;
  int64_t layer = 0;
  std::vector<std::string> gemms = {"w13", "w2"};
  std::string tokens;
  std::string rows;
  std::string threads;
  std::vector<std::string> dtypes;
  std::vector<std::string> variants;
  std::string routing;
  int64_t fresh_routings = 0;
  std::vector<std::string> impls;
  std::string isa;
  std::string weights = "cold";
  int64_t reps = 9;
  double min_time = 0.2;
  uint64_t seed = 1;
  std::string json;
  bool explain = false;
  bool tune = false;
  std::string tuning_cache;
  std::string baseline;
  double fail_slower = 5;
  bool list = false;
};

int list() {
  const auto line = [](const std::string& name, const std::string& dtypes,
                       const std::string& variants, const std::string& impls) {
    fmt::print("{:<28} {:<14} {:<28} {}\n", name, dtypes, variants, impls);
  };
  const auto words = [](const std::vector<std::string>& list) {
    return list.empty() ? "-" : fmt::format("{}", fmt::join(list, " "));
  };
  line("operator", "dtypes", "variants", "implementations");
  for (const Operator& op : operators()) {
    line(op.name, words(op.dtypes), words(op.variants),
         words(op.impls(op.dtypes.front(), machine().isa)));
  }
  fmt::print("\nproblems: {}\nISAs:    ", fmt::join(problem_names(), " "));
  for (int i = 0; i <= static_cast<int>(machine().isa); ++i) {
    fmt::print(" {}", to_string(static_cast<Isa>(i)));
  }
  fmt::print("\n");
  return kFine;
}

nlohmann::json machine_json(const Limits& limits) {
  const Machine& m = machine();
  const auto peaks = [](const Limits::PerDtype& gops) -> nlohmann::json {
    return {{"f32", gops.f32}, {"bf16", gops.bf16}, {"s8", gops.s8}};
  };
  return {{"cpu", m.cpu},
          {"isa", to_string(m.isa)},
          {"cores", m.cores},
          {"l2_bytes", m.l2_bytes},
          {"l3_bytes", m.l3_bytes},
          {"dot_peak_gops", peaks(limits.dot_peak_gops)},
          {"vector_dot_peak_gops", peaks(limits.vector_dot_peak_gops)},
          {"read_gbps", limits.read_gbps},
          {"copy_gbps", limits.copy_gbps}};
}

const Operator& operator_of(const std::string& name) {
  std::vector<std::string> names;
  for (const Operator& op : operators()) {
    if (op.name == name) return op;
    names.push_back(op.name);
  }
  throw Error(fmt::format("--op {}: this build measures {}", name, fmt::join(names, ", ")));
}

void check_known(const char* option, const Operator& op, const std::string& value,
                 const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), value) != known.end()) return;
  throw Error(known.empty() ? fmt::format("{} {}: {} has one form only", option, value, op.name)
                            : fmt::format("{} {}: {} has {}", option, value, op.name,
                                          fmt::join(known, ", ")));
}

Options options_of(const Arguments& args, const Operator& op, const std::string& dtype) {
  Options options;
  if (args.model.empty()) {
    options.problem = load_problem(args.problem);
  } else if (!op.takes_model || !args.variants.empty()) {
    throw Error(fmt::format("--model: not with {}", op.takes_model ? "--variant" : op.name));
  }
  options.model = args.model;
  options.layer = args.layer;
  options.gemms = args.gemms;
  if (!args.rows.empty()) {
    if (!op.takes_rows) throw Error(fmt::format("--rows: {} takes --tokens", op.name));
    options.rows = parse_list("--rows", args.rows);
  } else {
    options.tokens = parse_list("--tokens", args.tokens.empty() ? op.tokens : args.tokens);
    options.routing.emplace(args.routing.empty() ? "uniform" : args.routing);
  }
  if (!op.takes_routing && !args.routing.empty()) {
    throw Error(fmt::format("--routing: {} has no experts", op.name));
  }
  options.dtype = dtype;
  check_known("--dtype", op, options.dtype, op.dtypes);
  options.variants = args.variants;
  if (options.variants.empty() && !op.variants.empty()) options.variants = {op.variants.front()};
  for (const std::string& variant : options.variants) {
    check_known("--variant", op, variant, op.variants);
  }
  if (!args.isa.empty()) {
    Isa isa = Isa::kScalar;
    if (!parse_isa(args.isa.c_str(), &isa) || isa > machine().isa) {
      throw Error(fmt::format("--isa {}: not an ISA of this machine; see --list", args.isa));
    }
    options.isa = isa;
  }
  std::vector<std::string> known = op.impls(options.dtype, isa_of(options));
  if (!args.model.empty()) known = {"moeops", "ref"};  // the others make their weights themselves
  options.impls = args.impls;
  if (options.impls.empty() && args.tune) {
    options.impls = {"moeops"};
  } else if (options.impls.empty()) {
    options.impls = known;
    std::erase(options.impls, "ref");  // a thousand times slower: only when asked for
  }
  for (const std::string& impl : options.impls) {
    check_known("--impl", op, impl, known);
  }
  options.cold = args.weights == "cold";
  options.reps = args.reps;
  options.min_seconds = args.min_time;
  if (args.fresh_routings > 0) {
    if (!op.fresh_routings || !args.rows.empty() || args.routing.starts_with("trace:")) {
      throw Error(fmt::format("--fresh-routings: not with {}", !op.fresh_routings ? op.name
                                                               : args.rows.empty()
                                                                   ? "--routing trace"
                                                                   : "--rows"));
    }
    options.fresh_routings = args.fresh_routings;
    options.reps = args.fresh_routings;
    options.min_seconds = 0;
  }
  options.seed = args.seed;
  options.explain = args.explain;
  options.tune = args.tune;
  options.tuning_cache = args.tuning_cache;
  if (args.tune && !op.tunes) {
    throw Error(fmt::format("--tune: grouped_matmul is tuned, for {} too", op.name));
  }
  if (args.tune &&
      std::find(options.impls.begin(), options.impls.end(), "moeops") == options.impls.end()) {
    throw Error("--tune: --impl has no moeops");
  }
  return options;
}

void print_results(const Options& options, const Operator& op, const std::vector<Result>& results) {
  const Result& first = results.front();
  fmt::print("{}, {}, {}, {}{} {}\n", op.name, first.problem, options.dtype,
             first.routing.empty() ? "" : first.routing + " routing, ", first.weights,
             first.gops > 0 ? "weights" : "data");
  for (const std::string& name : options.impls) {
    for (const Result& r : results) {
      if (r.impl != name) continue;
      fmt::print("  {}: {}\n", name, r.impl_detail);
      break;
    }
  }
  if (!first.note.empty()) fmt::print("  {}\n", first.note);
  fmt::print("{}\n", table(results));
}

// Before anything is measured, whether the file can be used.
void check_tuning_cache(const Arguments& args) {
  if (args.tune) {
    check_tuning_file(args.tuning_cache);
  } else if (!args.tuning_cache.empty()) {
    Tuning tuning;
    const Status status = Tuning::read(args.tuning_cache.c_str(), &tuning);
    if (!status.ok()) {
      throw Error(fmt::format("--tuning-cache {}: {}", args.tuning_cache, status.message()));
    }
  }
  set_tuning_cache(args.tuning_cache);
}

int run(const Arguments& args) {
  std::vector<std::pair<const Operator*, Options>> runs;
  for (const std::string& name : args.ops) {
    const Operator& op = operator_of(name);
    const std::vector<std::string> first = {op.dtypes.front()};
    for (const std::string& dtype : args.dtypes.empty() ? first : args.dtypes) {
      runs.emplace_back(&op, options_of(args, op, dtype));
    }
  }
  std::vector<int64_t> threads = {machine().threads};
  if (!args.threads.empty()) threads = parse_list("--threads", args.threads);
  if (*std::max_element(threads.begin(), threads.end()) > 4096) {
    throw Error("--threads: more than 4096");
  }
  check_tuning_cache(args);

  const bool terminal = isatty(STDERR_FILENO) != 0;
  const Progress progress = [&](const std::string& words) {
    if (terminal) fmt::print(stderr, "\r\x1b[K{}", words);
  };

  std::vector<Result> results;
  nlohmann::json machine_facts;
  for (const int64_t count : threads) {
    progress("measuring the machine");
    LimitsMeter meter;
    const Status status = LimitsMeter::create(static_cast<int>(count), &meter);
    if (!status.ok()) throw Error(status.message());
    const Limits limits = meter.measure();
    if (machine_facts.is_null()) machine_facts = machine_json(limits);
    progress("");
    fmt::print(
        "{}, {} thread{}: peak {:.0f} f32, {:.0f} bf16, {:.0f} s8 Gop/s; reads {:.1f} GB/s, "
        "copies {:.1f} GB/s\n",
        machine().cpu, count, count == 1 ? "" : "s", limits.dot_peak_gops.f32,
        limits.dot_peak_gops.bf16, limits.dot_peak_gops.s8, limits.read_gbps, limits.copy_gbps);
    for (auto& [op, options] : runs) {
      options.threads = static_cast<int>(count);
      const std::vector<Result> of_these = op->run(options, meter, progress);
      progress("");
      print_results(options, *op, of_these);
      results.insert(results.end(), of_these.begin(), of_these.end());
    }
  }

  if (!args.json.empty()) {
    nlohmann::json lines = nlohmann::json::array();
    for (const Result& r : results) lines.push_back(to_json(r));
    tools::write_file_atomically(
        args.json, nlohmann::json{{"machine", machine_facts}, {"results", lines}}.dump(1) + "\n");
  }
  int exit_status = kFine;
  for (const Result& r : results) {
    if (r.verified) continue;
    fmt::print(stderr, "opbench: wrong, not timed: {}: {}\n", r.repro, r.wrong);
    exit_status = kMissed;
  }
  if (!args.baseline.empty()) {
    for (const std::string& words : regressions(results, args.baseline, args.fail_slower)) {
      fmt::print(stderr, "opbench: {}\n", words);
      exit_status = exit_status == kFine ? kRegression : exit_status;
    }
  }
  return exit_status;
}

int main_of(int argc, char** argv) {
  Arguments args;
  CLI::App app{"Times operators on real models' shapes, verified, against what the machine can do.",
               "opbench"};
  app.add_option("--op", args.ops, "Operators, with commas")->delimiter(',');
  CLI::Option* problem =
      app.add_option("--problem", args.problem, "A name out of --list, or a JSON file like those")
          ->capture_default_str();
  CLI::Option* layer = app.add_option("--layer", args.layer, "With --model: which")
                           ->check(CLI::Range(int64_t{0}, int64_t{100000}));
  layer->needs(app.add_option("--model", args.model,
                              "Instead of a problem: a layer of a model's folder as Hugging Face "
                              "has it, with its weights")
                   ->excludes(problem)
                   ->needs(layer));
  app.add_option("--gemm", args.gemms, "Of the layer's two: w13, w2")
      ->delimiter(',')
      ->check(CLI::IsMember({"w13", "w2"}));
  CLI::Option* tokens =
      app.add_option("--tokens", args.tokens,
                     "A list: 1,8,64, 1-2048*2 or 64-256+64; default: the operator's own");
  app.add_option("--rows", args.rows, "Instead of tokens: rows of every expert, or of each, a list")
      ->excludes(tokens);
  app.add_option("--threads", args.threads, "A list; default: all CPUs the process may use");
  app.add_option("--dtype", args.dtypes, "With commas; default: the operator's first in --list")
      ->delimiter(',');
  app.add_option("--variant", args.variants,
                 "Forms of the operator, with commas; default: its first in --list")
      ->delimiter(',');
  app.add_option("--routing", args.routing,
                 "uniform (the default), balanced, zipf:S, hot:F or trace:FILE");
  app.add_option("--fresh-routings", args.fresh_routings,
                 "So many calls, each with a routing of its own, and the slowest of them against "
                 "its neighbours")
      ->check(CLI::Range(int64_t{18}, int64_t{100000}));
  app.add_option("--impl", args.impls,
                 "Implementations, with commas; default all but ref, with --tune moeops alone")
      ->delimiter(',');
  app.add_option("--isa", args.isa, "Force a lower ISA");
  app.add_option("--weights", args.weights,
                 "cold: weights, or an operator's inputs and outputs if it has none, come from "
                 "memory at every call")
      ->check(CLI::IsMember({"cold", "warm"}))
      ->capture_default_str();
  app.add_option("--reps", args.reps, "Repetitions, at least")
      ->check(CLI::Range(int64_t{1}, int64_t{1000}))
      ->capture_default_str();
  app.add_option("--min-time", args.min_time, "Seconds of repetitions, at least")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  app.add_option("--seed", args.seed)->capture_default_str();
  app.add_option("--json", args.json, "Write the results to this file");
  app.add_flag("--explain", args.explain,
               "Print the plan chosen for each problem, and where the time of a moe_layer goes");
  app.add_flag("--tune", args.tune,
               "Search faster plans for moeops' GEMMs, each verified bit for bit, and write those "
               "that win to the tuning cache; measures with them");
  app.add_option("--tuning-cache", args.tuning_cache,
                 "The file of tuned plans to run with; with --tune the one to write or add to, "
                 "./moeops.tuning by default");
  CLI::Option* baseline =
      app.add_option("--baseline", args.baseline, "Compare with an earlier --json file");
  app.add_option("--fail-slower", args.fail_slower,
                 "With --baseline: exit 3 if a median is more than this many % slower")
      ->needs(baseline)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_flag("--list", args.list, "Print operators and their forms, problems and ISAs");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kFine : kUsage;
  }
  if (args.list) return list();
  if (args.tune && args.tuning_cache.empty()) args.tuning_cache = "moeops.tuning";
  if (args.ops.empty()) throw Error("--op is missing; --list shows what there is");
  return run(args);
}

}  // namespace

}  // namespace moeops::bench

int main(int argc, char** argv) {
  try {
    return moeops::bench::main_of(argc, argv);
  } catch (const std::bad_alloc&) {
    std::fputs("opbench: out of memory\n", stderr);
  } catch (const std::exception& error) {
    fmt::print(stderr, "opbench: {}\n", error.what());
  }
  return 2;
}

// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/result.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>

#include "tools/tensor_file/error.h"
#include "tools/tensor_file/strict_json.h"

namespace moeops::bench {

using tools::Error;

namespace {

// What makes two results measurements of the same thing.
std::string identity(const nlohmann::json& result) {
  std::string key;
  for (const char* field : {"op", "problem", "tokens", "rows", "gemm", "dtype", "routing", "impl",
                            "isa", "threads", "weights"}) {
    key += result.at(field).dump() + ' ';
  }
  return key + result.value("variant", "") +
         (result.value("fresh_routings", 0) > 0 ? " fresh" : "");
}

}  // namespace

nlohmann::json to_json(const Result& r) {
  nlohmann::json json = {{"op", r.op},
                         {"problem", r.problem},
                         {"tokens", r.tokens},
                         {"rows", r.rows},
                         {"experts", r.experts},
                         {"active_experts", r.active_experts},
                         {"gemm", r.gemm},
                         {"n", r.n},
                         {"k", r.k},
                         {"dtype", r.dtype},
                         {"variant", r.variant},
                         {"routing", r.routing},
                         {"fresh_routings", r.fresh_routings},
                         {"impl", r.impl},
                         {"impl_detail", r.impl_detail},
                         {"note", r.note},
                         {"isa", r.isa},
                         {"threads", r.threads},
                         {"weights", r.weights},
                         {"verified", r.verified},
                         {"steady", r.steady},
                         {"reps", r.reps},
                         {"median_ms", r.median_ms},
                         {"min_ms", r.min_ms},
                         {"max_ms", r.max_ms},
                         {"spread", r.spread},
                         {"worst_of_neighbours", r.worst_of_neighbours},
                         {"stolen_ms", r.stolen_ms},
                         {"gops", r.gops},
                         {"gbps", r.gbps},
                         {"tokens_per_s", r.tokens_per_s},
                         {"read_bytes", r.read_bytes},
                         {"written_bytes", r.written_bytes},
                         {"roofline_ms", r.roofline_ms},
                         {"roofline_fraction", r.roofline_fraction},
                         {"dot_peak_gops", r.dot_peak_gops},
                         {"read_gbps", r.read_gbps},
                         {"copy_gbps", r.copy_gbps},
                         {"repro", r.repro}};
  if (!r.verified) json["wrong"] = r.wrong;
  return json;
}

std::string table(const std::vector<Result>& results) {
  if (results.empty()) return {};
  const bool gemm = !results.front().gemm.empty();
  // A GEMM is judged by its operations and takes milliseconds; the others by their bytes, and
  // their latency at one token counts microseconds.
  std::string text =
      gemm ? fmt::format(
                 "{:<4} {:>6} {:>9} {:>7} {:<9} {:>10} {:>10} {:>6} {:>8} {:>7} {:>9} {:>9}\n",
                 "gemm", "tokens", "rows/exp", "experts", "impl", "median ms", "min ms", "spread",
                 "Gop/s", "GB/s", "roofline", "vs moeops")
           : fmt::format(
                 "{:<12} {:>7} {:>8} {:<9} {:>12} {:>12} {:>6} {:>10} {:>8} {:>7} {:>9} {:>9}\n",
                 "variant", "tokens", "rows", "impl", "median us", "min us", "spread", "Mtoken/s",
                 "Gop/s", "GB/s", "roofline", "vs moeops");
  for (const Result& r : results) {
    const std::string tokens = r.tokens > 0 ? std::to_string(r.tokens) : "-";
    text += gemm ? fmt::format("{:<4} {:>6} {:>9.1f} {:>7} {:<9} ", r.gemm, tokens,
                               static_cast<double>(r.rows) / static_cast<double>(r.active_experts),
                               r.active_experts, r.impl)
                 : fmt::format("{:<12} {:>7} {:>8} {:<9} ", r.variant.empty() ? "-" : r.variant,
                               tokens, r.rows, r.impl);
    if (!r.verified) {
      text += fmt::format("WRONG, not timed: {}\n", r.wrong);
      continue;
    }
    text += gemm ? fmt::format("{:>10.4f} {:>10.4f} {:>5.1f}% {:>8.1f}", r.median_ms, r.min_ms,
                               100 * r.spread, r.gops)
                 : fmt::format("{:>12.2f} {:>12.2f} {:>5.1f}% {:>10.4f} {:>8}", 1e3 * r.median_ms,
                               1e3 * r.min_ms, 100 * r.spread, 1e-6 * r.tokens_per_s,
                               r.gops > 0 ? fmt::format("{:.1f}", r.gops) : "-");
    const auto ours = std::find_if(results.begin(), results.end(), [&](const Result& other) {
      return other.impl == "moeops" && other.verified && other.gemm == r.gemm &&
             other.variant == r.variant && other.tokens == r.tokens && other.rows == r.rows &&
             other.threads == r.threads;
    });
    text += fmt::format(" {:>7.1f} {:>8.1f}% {:>9}{}\n", r.gbps, 100 * r.roofline_fraction,
                        r.impl == "moeops" || ours == results.end()
                            ? ""
                            : fmt::format("{:.2f}x", r.median_ms / ours->median_ms),
                        r.steady ? "" : "  unsteady");
    if (r.fresh_routings > 0) {
      text += fmt::format(
          "     {} fresh routings: slowest {:.4f} ms, at most {:.2f} times the median of its "
          "neighbours{}\n",
          r.reps, r.max_ms, r.worst_of_neighbours,
          r.stolen_ms > 0 ? fmt::format("; the hypervisor took {:.0f} ms of the CPUs", r.stolen_ms)
                          : "");
    }
    for (const std::string& words : r.explain) text += fmt::format("     {}\n", words);
  }
  return text;
}

std::vector<std::string> regressions(const std::vector<Result>& results,
                                     const std::string& baseline_file, double percent) {
  std::ifstream file(baseline_file);
  if (!file) throw Error(fmt::format("--baseline {}: cannot be read", baseline_file));
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const nlohmann::json baseline = tools::parse_strict_json(text, baseline_file);
  std::map<std::string, nlohmann::json> before;
  try {
    for (const nlohmann::json& result : baseline.at("results")) {
      if (result.at("verified").get<bool>()) before[identity(result)] = result;
    }
  } catch (const nlohmann::json::exception& e) {
    throw Error(fmt::format("{}: not written by opbench --json: {}", baseline_file, e.what()));
  }

  std::vector<std::string> slower;
  for (const Result& r : results) {
    const auto it = before.find(identity(to_json(r)));
    if (it == before.end() || !r.verified) continue;
    if (!r.steady || !it->second.value("steady", false)) continue;
    const double old_ms = it->second.value("median_ms", 0.0);
    const double noise = std::max(r.spread, it->second.value("spread", 0.0)) * old_ms;
    if (r.median_ms > old_ms * (1 + percent / 100) && r.median_ms - old_ms > noise) {
      slower.push_back(fmt::format("{:.1f}% slower: {:.4f} ms, was {:.4f} ms: {}",
                                   100 * (r.median_ms / old_ms - 1), r.median_ms, old_ms, r.repro));
    }
  }
  return slower;
}

}  // namespace moeops::bench

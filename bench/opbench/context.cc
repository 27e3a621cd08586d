// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/context.h"

#include "tools/tensor_file/error.h"

namespace moeops::bench {

namespace {

std::string& tuning_cache() {
  static std::string path;
  return path;
}

}  // namespace

void set_tuning_cache(const std::string& path) { tuning_cache() = path; }

std::unique_ptr<Context> make_context(int threads, std::optional<Isa> isa) {
  auto context = std::make_unique<Context>(
      ContextOptions{.threads = threads,
                     .isa = isa,
                     .tuning_cache = tuning_cache().empty() ? nullptr : tuning_cache().c_str()});
  if (!context->status().ok()) throw tools::Error(context->status().message());
  return context;
}

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>

#include <memory>
#include <optional>
#include <string>

namespace moeops::bench {

// The tuning cache of every context that is made from now on; empty: none.
void set_tuning_cache(const std::string& path);

// What an implementation of ours runs with; throws tools::Error.
std::unique_ptr<Context> make_context(int threads, std::optional<Isa> isa);

}  // namespace moeops::bench

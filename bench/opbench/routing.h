// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moeops::bench {

// Which experts tokens choose: uniform, zipf:S, hot:F, balanced or trace:FILE.
class Routing {
 public:
  // A trace is read here. Throws tools::Error.
  explicit Routing(const std::string& text);

  const std::string& text() const { return text_; }

  // [tokens, top_k]: the distinct experts of `experts` that each token chooses. A trace gives its
  // first tokens, from the beginning again when there are too few. Throws tools::Error when the
  // trace is of another shape.
  std::vector<int32_t> expert_ids(int64_t tokens, int64_t experts, int64_t top_k,
                                  uint64_t seed) const;

  // How often each expert is among them.
  std::vector<int64_t> rows_per_expert(int64_t tokens, int64_t experts, int64_t top_k,
                                       uint64_t seed) const;

 private:
  enum class Kind { kUniform, kZipf, kHot, kBalanced, kTrace };

  std::string text_;
  Kind kind_ = Kind::kUniform;
  double parameter_ = 0;
  std::string file_;
  std::vector<std::vector<int64_t>> trace_;  // a token's experts
};

}  // namespace moeops::bench

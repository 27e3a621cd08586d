// SPDX-License-Identifier: Apache-2.0
// A case file from anywhere, read and replayed under the reference.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "tools/opdiff/run.h"
#include "tools/tensor_file/error.h"

namespace {

using moeops::tools::Case;

// Sizes above this only take time and memory.
constexpr int64_t kLargest = 64;

bool small(const nlohmann::json& value) {
  if (value.is_number()) return value >= -kLargest && value <= kLargest;
  return !value.is_structured() || std::all_of(value.begin(), value.end(), small);
}

bool small(const Case::Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const auto& entry) {
    const auto& shape = entry.second.shape;
    return std::all_of(shape.begin(), shape.end(), [](int64_t n) { return n <= kLargest; });
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moeops::tools;  // NOLINT(google-build-using-namespace)
  static moeops::Context context;
  try {
    const auto bytes = std::as_bytes(std::span(data, size));
    const Case c = case_of(SafetensorsFile::parse("case", bytes), "case");
    if (small(c.params) && small(c.inputs) && small(c.outputs)) {
      (void)to_text(run_case(c, Impl::kRef, context, 3));
    }
  } catch (const Error&) {
    // What a broken file comes to.
  }
  return 0;
}

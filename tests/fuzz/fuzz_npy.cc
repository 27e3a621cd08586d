// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>

#include "tools/opdiff/compare.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/npy.h"

// Whatever the bytes, they are refused with an Error or the tensor can be read to its end, which
// the comparison does: and it must find it equal to itself.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moeops::tools;
  try {
    const auto file = NpyFile::parse("input", std::as_bytes(std::span(data, size)));
    if (!compare(file.tensor(), file.tensor(), kExact).pass) std::abort();
  } catch (const Error&) {
  }
  return 0;
}

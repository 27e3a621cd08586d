// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>

#include "tools/opdiff/compare.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/safetensors.h"

// Whatever the bytes, they are refused with an Error or every tensor can be read to its end, which
// the comparison does: and it must find each equal to itself.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moeops::tools;
  try {
    const auto file = SafetensorsFile::parse("input", std::as_bytes(std::span(data, size)));
    for (const auto& [name, tensor] : file.tensors()) {
      if (!compare(tensor, tensor, kExact).pass) std::abort();
      if (file.find(name) == nullptr) std::abort();
    }
  } catch (const Error&) {
  }
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx512.h"
#include "tests/core/simd_probe_body.h"

namespace moeops::test {

const SimdProbe simd_probe_avx512 = make_probe(Isa::kAvx512);

}  // namespace moeops::test

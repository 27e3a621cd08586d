// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx2.h"
#include "tests/core/simd_probe_body.h"

namespace moeops::test {

const SimdProbe simd_probe_avx2 = make_probe(Isa::kAvx2);

}  // namespace moeops::test

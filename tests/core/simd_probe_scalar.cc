// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_scalar.h"
#include "tests/core/simd_probe_body.h"

namespace moeops::test {

const SimdProbe simd_probe_scalar = make_probe(Isa::kScalar);

}  // namespace moeops::test

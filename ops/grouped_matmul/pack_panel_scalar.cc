// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/pack_panel_body.h"

namespace moeops::grouped_matmul_internal {

extern const PanelPacker pack_panel_scalar;
const PanelPacker pack_panel_scalar = {Isa::kScalar, pack_panel};

}  // namespace moeops::grouped_matmul_internal

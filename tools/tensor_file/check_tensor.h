// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "tools/tensor_file/tensor.h"

namespace moeops::tools {

// An Error, which starts with `what`, if a BOOL holds a byte other than 0 and 1: it would be
// undefined behaviour to read it as a C++ bool.
void check_bools(std::string_view what, const TensorRef& tensor);

// An Error if a tensor to be written has other bytes than its dtype and shape ask for.
void check_bytes(std::string_view what, const TensorRef& tensor);

}  // namespace moeops::tools

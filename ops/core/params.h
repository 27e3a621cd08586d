// SPDX-License-Identifier: Apache-2.0
#pragma once

// Parameters that more than one operator takes. An operator's header says what they do there. A
// value that is none of the enumerators is an invalid argument, of these and of every operator's
// own enumerations.

namespace moeops {

enum class Activation { kNone, kRelu, kGeluTanh, kSilu };  // of a GEMM's output

enum class GatedActivation { kSilu, kSwigluOai, kGeluTanh };  // of the swiglu family: act(g) * u

enum class Gate { kLeft, kRight, kInterleaved };  // where the gate g lies in [g u]

// How `group_list` (i64) says which consecutive rows belong to which group.
enum class ListType {
  kCount,   // [E]: rows of expert e
  kCumsum,  // [E]: rows of the experts 0 to e together
  kSparse,  // [G, 2]: (expert, rows), in any order; experts may repeat or be missing
};

}  // namespace moeops

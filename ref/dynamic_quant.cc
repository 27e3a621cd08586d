// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/dynamic_quant_row.h"
#include "ref/group_list.h"
#include "ref/guarded.h"
#include "ref/numeric.h"

namespace moeops::ref {

namespace {

void asymmetric_row(const std::vector<float>& v, int8_t* q, float* scale, float* offset) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const bool finite = std::all_of(v.begin(), v.end(), [](float x) { return std::isfinite(x); });
  const float max = v.empty() ? 0.0f : *std::max_element(v.begin(), v.end());
  const float min = v.empty() ? 0.0f : *std::min_element(v.begin(), v.end());
  *scale = finite ? std::fmax((max - min) / 255.0f, 1e-12f) : nan;
  *offset = finite ? 127.0f - max / *scale : nan;
  for (size_t j = 0; j < v.size(); ++j) q[j] = quantise(v[j] / *scale + *offset, -128.0f);
}

Status run(const DynamicQuantArgs& args) {
  ArgCheck check("dynamic_quant");
  Dim M{"M"}, H{"H"}, G{"G"}, entries{"entries"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {M, H});
  if (args.group_list.present()) {
    check_group_list_view(check, args.group_list, ListType::kCumsum, G, entries);
    check.input("smooth", args.smooth, {DType::kF32}, {G, H});
  } else {
    check.optional_input("smooth", args.smooth, {DType::kF32}, {H});
  }
  check.output("q", args.q, {DType::kS8}, {M, H});
  check.output("scale", args.scale, {DType::kF32}, {M});
  if (args.asymmetric) {
    check.output("offset", args.offset, {DType::kF32}, {M});
  } else {
    check.absent("offset", args.offset, "asymmetric is false");
  }
  // The row of smooth that each row of x goes with.
  std::vector<Group> groups{{0, M.value}};
  if (args.group_list.present()) {
    groups = read_group_list(check, args.group_list, ListType::kCumsum, G.value, M.value);
    int64_t rows = 0;
    for (const Group& group : groups) rows += group.rows;
    check.require(rows == M.value, "group_list ends with %" PRId64 ", expected M = %" PRId64, rows,
                  M.value);
  }
  MOEOPS_RETURN_IF_ERROR(check.finish());

  std::vector<float> v(static_cast<size_t>(H.value));
  int64_t row = 0;
  for (const Group& group : groups) {
    for (int64_t i = 0; i < group.rows; ++i, ++row) {
      for (int64_t j = 0; j < H.value; ++j) {
        const float x = FloatRow(args.x, row)[j];
        v[static_cast<size_t>(j)] =
            args.smooth.present() ? x * args.smooth.row<float>(group.expert)[j] : x;
      }
      float* scale = args.scale.row<float>(0) + row;
      if (args.asymmetric) {
        asymmetric_row(v, args.q.row<int8_t>(row), scale, args.offset.row<float>(0) + row);
      } else {
        dynamic_quant_row(H.value, v.data(), args.q.row<int8_t>(row), scale);
      }
    }
  }
  return {};
}

}  // namespace

Status dynamic_quant(const DynamicQuantArgs& args) noexcept {
  return guarded("dynamic_quant", [&] { return run(args); });
}

}  // namespace moeops::ref

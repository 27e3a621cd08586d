// SPDX-License-Identifier: Apache-2.0
#pragma once

// Every way in which a view can be malformed, tried on every view of a call that is right as it
// stands: each must give invalid_argument and leave every output as it was.

#include <gtest/gtest.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace moeops::test {

template <class Args>
struct InputView {
  const char* name;
  ConstTensorView Args::*view;
  bool required = true;
};

template <class Args>
struct OutputView {
  const char* name;
  TensorView Args::*view;
  bool required = true;
};

namespace sweep_internal {

// The ways to break a layout; sizes only shrink, so that a check that failed would not also read
// out of bounds.
template <class View>
std::vector<std::pair<std::string, View>> malformed(const View& good) {
  std::vector<std::pair<std::string, View>> all;
  const auto add = [&](const std::string& what, auto change) {
    View bad = good;
    change(bad);
    all.emplace_back(what, bad);
  };
  add("null data", [](View& v) { v.data = nullptr; });
  add("misaligned", [](View& v) {
    v.data = reinterpret_cast<decltype(v.data)>(reinterpret_cast<uintptr_t>(v.data) + 1);
    if (size_of(v.dtype) == 1) v.dtype = DType::kF32;  // bytes cannot be misaligned
  });
  add("wrong dtype",
      [](View& v) { v.dtype = v.dtype == DType::kI64 ? DType::kBool : DType::kI64; });
  add("rank 0", [](View& v) { v.rank = 0; });
  add("one dimension more", [](View& v) { ++v.rank; });
  add("short row stride", [](View& v) { v.row_stride = v.columns() - 1; });
  add("negative row stride", [](View& v) { v.row_stride = -v.columns(); });
  // Of a view with a single row the stride is never used.
  if (good.rows() > 2) {
    add("row stride that overflows", [](View& v) { v.row_stride = INT64_MAX / 2; });
  }
  for (int i = 0; i < good.rank; ++i) {
    const auto d = static_cast<size_t>(i);
    const std::string dim = "shape[" + std::to_string(i) + "]";
    add("negative " + dim, [&](View& v) { v.shape[d] = -1; });
    add("smaller " + dim, [&](View& v) { --v.shape[d]; });
    add("huge " + dim, [&](View& v) { v.shape[d] = INT64_MAX / 2; });
  }
  return all;
}

}  // namespace sweep_internal

// `call` runs the operator; `args` must be right, with no empty view.
template <class Args, class Call>
void sweep_contract(const Args& args, const std::vector<InputView<Args>>& inputs,
                    const std::vector<OutputView<Args>>& outputs, Call call) {
  const auto bytes = [](const TensorView& v) {
    return static_cast<size_t>(((v.rows() - 1) * v.row_stride + v.columns()) * size_of(v.dtype));
  };
  const auto refuses = [&](const Args& bad, const std::string& what) {
    for (const auto& output : outputs) {
      const TensorView& v = args.*output.view;
      if (v.present()) std::memset(v.data, 0xA5, bytes(v));
    }
    const Status status = call(bad);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << what << ": " << status.message();
    for (const auto& output : outputs) {
      const TensorView& v = args.*output.view;
      if (!v.present()) continue;
      const auto* p = static_cast<const unsigned char*>(v.data);
      for (size_t i = 0; i < bytes(v); ++i) {
        ASSERT_EQ(p[i], 0xA5) << what << " wrote byte " << i << " of " << output.name;
      }
    }
  };

  {
    const Status status = call(args);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  for (const auto& input : inputs) {
    const ConstTensorView good = args.*input.view;
    ASSERT_TRUE(good.present()) << input.name << ": the sweep needs every view";
    Args bad = args;
    for (const auto& [what, view] : sweep_internal::malformed(good)) {
      bad.*input.view = view;
      refuses(bad, std::string(input.name) + ": " + what);
    }
    if (input.required) {
      bad.*input.view = {};
      refuses(bad, std::string(input.name) + ": missing");
    }
  }
  for (const auto& output : outputs) {
    const TensorView good = args.*output.view;
    ASSERT_TRUE(good.present()) << output.name << ": the sweep needs every view";
    Args bad = args;
    for (const auto& [what, view] : sweep_internal::malformed(good)) {
      bad.*output.view = view;
      refuses(bad, std::string(output.name) + ": " + what);
    }
    if (output.required) {
      bad.*output.view = {};
      refuses(bad, std::string(output.name) + ": missing");
    }
    for (const auto& input : inputs) {
      // The output ends where the input begins, plus one byte: the smallest overlap there is, as
      // far as the output's alignment allows.
      bad.*output.view = good;
      (bad.*output.view).data = const_cast<void*>((args.*input.view).data);
      const auto at = reinterpret_cast<uintptr_t>((bad.*output.view).data);
      if (at % static_cast<uintptr_t>(size_of(good.dtype)) != 0) continue;
      refuses(bad, std::string(output.name) + ": overlaps " + input.name);
    }
    for (const auto& other : outputs) {
      if (other.view == output.view) continue;
      bad.*output.view = good;
      (bad.*output.view).data = (args.*other.view).data;
      refuses(bad, std::string(output.name) + ": overlaps " + other.name);
    }
  }
}

}  // namespace moeops::test

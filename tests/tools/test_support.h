// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tools/tensor_file/error.h"
#include "tools/tensor_file/tensor.h"

namespace moeops::tools {

// A folder of the test's own, gone with the test.
class TempDir {
 public:
  TempDir() {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    path_ = std::filesystem::path(testing::TempDir()) /
            (std::string("moeops_") + test->test_suite_name() + "_" + test->name() + "_" +
             std::to_string(::getpid()));
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

 private:
  std::filesystem::path path_;
};

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_text(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text));
}

template <class T>
Tensor make_tensor(FileDType dtype, std::vector<int64_t> shape, std::initializer_list<T> values) {
  Tensor tensor(dtype, std::move(shape));
  EXPECT_EQ(tensor.data.size(), values.size() * sizeof(T));
  std::ranges::copy(std::as_bytes(std::span(values)), tensor.data.begin());
  return tensor;
}

// Of every dtype there is: [2,3] of bytes that are legal in it, and differ.
inline std::vector<Tensor> tensors_of_all_dtypes() {
  std::vector<Tensor> tensors;
  for (const FileDTypeInfo& type : kFileDTypes) {
    Tensor tensor(type.id, {2, 3});
    for (size_t i = 0; i < tensor.data.size(); ++i) {
      tensor.data[i] = static_cast<std::byte>(type.id == FileDType::kBool ? i % 2 : 7 * i + 1);
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

inline void expect_same(const TensorRef& got, const TensorRef& expected) {
  EXPECT_EQ(got.dtype, expected.dtype);
  EXPECT_EQ(got.shape, expected.shape);
  EXPECT_EQ(Tensor(got).data, Tensor(expected).data);
}

// The message of the Error that `call` throws; every one of `parts` must be in it.
template <class Call>
void expect_error(Call&& call, std::initializer_list<std::string_view> parts) {
  try {
    call();
    ADD_FAILURE() << "no error, expected one with " << *parts.begin();
  } catch (const Error& error) {
    const std::string_view message = error.what();
    for (std::string_view part : parts) {
      EXPECT_NE(message.find(part), message.npos) << "no \"" << part << "\" in: " << message;
    }
  }
}

}  // namespace moeops::tools

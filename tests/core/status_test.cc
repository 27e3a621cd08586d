// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/core/status.h>

#include <string>

namespace moeops {
namespace {

TEST(Status, SaysWhatWasWrong) {
  EXPECT_TRUE(Status().ok());
  EXPECT_STREQ(Status().message(), "");
  const Status status(StatusCode::kInvalidArgument, "ids[%d] = %d", 3, 64);
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_STREQ(status.message(), "ids[3] = 64");
  EXPECT_STREQ(to_string(status.code()), "invalid_argument");
}

TEST(Status, CutsALongMessage) {
  const std::string text(1000, 'a');
  const Status status(StatusCode::kInternal, "%s", text.c_str());
  const Status copy = status;
  const size_t length = std::string(copy.message()).size();
  EXPECT_GT(length, 200u);
  EXPECT_LT(length, sizeof(Status));
  EXPECT_EQ(text.compare(0, length, copy.message()), 0);
}

}  // namespace
}  // namespace moeops

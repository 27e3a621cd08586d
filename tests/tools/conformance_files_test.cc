// SPDX-License-Identifier: Apache-2.0
#include <filesystem>

#include "tests/tools/test_support.h"
#include "tools/opdiff/compare.h"
#include "tools/tensor_file/safetensors.h"

namespace moeops::tools {
namespace {

// Written with NumPy by somebody else: what we read must survive being written by us.
TEST(ConformanceFiles, OpenAndSurviveARoundTrip) {
  const TempDir dir;
  int files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(MOEOPS_CONFORMANCE_DIR)) {
    if (entry.path().extension() != ".safetensors") continue;
    SCOPED_TRACE(entry.path());
    ++files;
    const auto original = SafetensorsFile::open(entry.path());
    ASSERT_TRUE(original.metadata().contains("op"));
    if (original.metadata().contains("tolerance")) {
      for (const auto& [output, tolerance] :
           parse_tolerance(entry.path().string(), original.metadata().at("tolerance"))) {
        const TensorRef* expected = original.find("out." + output);
        ASSERT_NE(expected, nullptr) << output;
        const Tensor copy(*expected);
        EXPECT_TRUE(compare(*expected, copy.ref(), tolerance).pass) << output;
      }
    }
    write_safetensors(dir / "copy", original.metadata(), original.tensors());
    const auto copy = SafetensorsFile::open(dir / "copy");
    EXPECT_EQ(copy.metadata(), original.metadata());
    ASSERT_EQ(copy.tensors().size(), original.tensors().size());
    for (size_t i = 0; i < original.tensors().size(); ++i) {
      EXPECT_EQ(copy.tensors()[i].name, original.tensors()[i].name);
      expect_same(copy.tensors()[i].tensor, original.tensors()[i].tensor);
    }
  }
  EXPECT_GT(files, 0);
}

}  // namespace
}  // namespace moeops::tools

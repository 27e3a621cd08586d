// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/write_file.h"

#include <sys/stat.h>

#include <ostream>
#include <stdexcept>

#include "tests/tools/test_support.h"
#include "tools/tensor_file/mapped_file.h"

namespace moeops::tools {
namespace {

using Names = std::vector<std::string>;

TEST(WriteFile, ReplacesTheFileAndLeavesNothingBeside) {
  const TempDir dir;
  write_file_atomically(dir / "a", "old");
  write_file_atomically(dir / "a", "new");
  EXPECT_EQ(read_text(dir / "a"), "new");
  EXPECT_EQ(dir.files(), Names{"a"});
}

TEST(WriteFile, AnExceptionLeavesTheOldFile) {
  const TempDir dir;
  write_text(dir / "a", "old");
  EXPECT_THROW(write_file_atomically(dir / "a",
                                     [](std::ostream& out) {
                                       out << "half";
                                       throw std::runtime_error("stop");
                                     }),
               std::runtime_error);
  EXPECT_EQ(read_text(dir / "a"), "old");
  EXPECT_EQ(dir.files(), Names{"a"});
}

TEST(WriteFile, AFailedStreamLeavesTheOldFile) {
  const TempDir dir;
  write_text(dir / "a", "old");
  expect_error(
      [&] {
        write_file_atomically(dir / "a", [](std::ostream& out) { out.setstate(std::ios::badbit); });
      },
      {(dir / "a").string(), "cannot write"});
  EXPECT_EQ(read_text(dir / "a"), "old");
  EXPECT_EQ(dir.files(), Names{"a"});
}

TEST(WriteFile, NamesTheFolderThatIsMissing) {
  const TempDir dir;
  const auto path = dir / "missing/a";
  expect_error([&] { write_file_atomically(path, "x"); },
               {path.string(), "No such file or directory"});
}

TEST(WriteFile, DoesNotReplaceADirectory) {
  const TempDir dir;
  std::filesystem::create_directory(dir / "a");
  expect_error([&] { write_file_atomically(dir / "a", "x"); },
               {(dir / "a").string(), "Is a directory"});
  EXPECT_TRUE(std::filesystem::is_directory(dir / "a"));
}

TEST(WriteFile, WritesThroughASymbolicLink) {
  const TempDir dir;
  write_text(dir / "target", "old");
  std::filesystem::create_symlink("target", dir / "link");
  write_file_atomically(dir / "link", "new");
  EXPECT_TRUE(std::filesystem::is_symlink(dir / "link"));
  EXPECT_EQ(read_text(dir / "target"), "new");
}

TEST(WriteFile, WritesStraightToADevice) {
  write_file_atomically("/dev/null", "x");
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

TEST(MappedFile, RefusesWhatIsNoFile) {
  const TempDir dir;
  expect_error([&] { MappedFile::open(dir / "missing"); },
               {(dir / "missing").string(), "No such file or directory"});
  std::filesystem::create_directory(dir / "folder");
  expect_error([&] { MappedFile::open(dir / "folder"); },
               {(dir / "folder").string(), "is a directory"});
  ASSERT_EQ(::mkfifo((dir / "pipe").c_str(), 0600), 0);
  expect_error([&] { MappedFile::open(dir / "pipe"); },
               {(dir / "pipe").string(), "is a device or pipe"});
}

TEST(MappedFile, MapsAnEmptyFile) {
  const TempDir dir;
  write_text(dir / "empty", "");
  EXPECT_TRUE(MappedFile::open(dir / "empty").bytes().empty());
}

TEST(MappedFile, MovesItsMapping) {
  const TempDir dir;
  write_text(dir / "a", "one");
  write_text(dir / "b", "other");
  MappedFile file = MappedFile::open(dir / "a");
  file = MappedFile::open(dir / "b");
  const MappedFile moved = std::move(file);
  EXPECT_EQ(moved.bytes().size(), 5u);
  EXPECT_EQ(moved.bytes()[0], std::byte{'o'});
}

}  // namespace
}  // namespace moeops::tools

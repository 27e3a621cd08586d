// SPDX-License-Identifier: Apache-2.0
// What opbench refuses before it measures anything, with which words.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cstdio>
#include <filesystem>
#include <string>

#include "tests/tools/test_support.h"

namespace moeops::bench {
namespace {

struct Outcome {
  int exit_status;
  std::string words;  // of both streams
};

// A call that waits for something is ended, and has the exit status 124.
Outcome opbench(const std::string& arguments) {
  const std::string command = "timeout 60 " MOEOPS_OPBENCH " " + arguments + " 2>&1";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return {-1, "popen failed"};
  Outcome outcome;
  char part[4096];
  for (size_t n = 0; (n = std::fread(part, 1, sizeof(part), pipe)) > 0;) {
    outcome.words.append(part, n);
  }
  const int status = pclose(pipe);
  outcome.exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

void expect_refused(const std::string& arguments, const std::string& why) {
  const Outcome outcome = opbench(arguments);
  EXPECT_EQ(outcome.exit_status, 2) << arguments << "\n" << outcome.words;
  EXPECT_NE(outcome.words.find(why), std::string::npos) << arguments << "\n" << outcome.words;
  EXPECT_EQ(outcome.words.find("peak"), std::string::npos) << "it measured the machine";
}

TEST(CommandLine, RefusesWhatAnOperatorDoesNotTake) {
  expect_refused("", "--op is missing");
  expect_refused("--op nothing", "--op nothing: this build measures");
  for (const char* op : {"quant_matmul", "w8a8_linear"}) {
    const std::string name = op;
    expect_refused("--op " + name + " --rows 3", "--rows: " + name + " takes --tokens");
    expect_refused("--op " + name + " --routing uniform", "--routing: " + name + " has no experts");
  }
  expect_refused("--op grouped_matmul --routing random", "--routing random: expected uniform");
}

TEST(CommandLine, RefusesATuningCacheThatIsNone) {
  const tools::TempDir dir;
  const std::string fifo = dir / "fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  for (const char* tune : {"", "--tune "}) {
    expect_refused(std::string("--op grouped_matmul ") + tune + "--tuning-cache " + fifo,
                   "not a regular file");
    expect_refused(std::string("--op grouped_matmul ") + tune + "--tuning-cache " + fifo + "/cache",
                   fifo + "/cache: ");
  }
  expect_refused("--op grouped_matmul --tune --tuning-cache " + std::string(dir / "none/cache"),
                 "none/cache: cannot write");
  const std::string fresh = dir / "fresh";
  expect_refused("--op quant_matmul --tune --tuning-cache " + fresh, "--tune: grouped_matmul is");
  EXPECT_FALSE(std::filesystem::exists(fresh)) << "for a call that is refused anyway";
}

TEST(CommandLine, HelpKnowsTheDefaultsOfTuning) {
  const Outcome help = opbench("--help");
  EXPECT_EQ(help.exit_status, 0);
  EXPECT_NE(help.words.find("--tune moeops alone"), std::string::npos) << help.words;
}

}  // namespace
}  // namespace moeops::bench

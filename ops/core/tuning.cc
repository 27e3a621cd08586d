// SPDX-License-Identifier: Apache-2.0
#include "ops/core/tuning.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <exception>
#include <locale>
#include <sstream>
#include <utility>

namespace moeops {

namespace {

// Beyond any plan, and small enough for products of them.
constexpr int64_t kMost = int64_t{1} << 20;
// Some 10,000 plans.
constexpr int64_t kMostBytes = int64_t{1} << 20;

// A plan is as good as the caches are large, and a virtual machine may hide the processor's name.
std::string first_line() {
  const Machine& m = machine();
  std::ostringstream line;
  line.imbue(std::locale::classic());
  line << "moeops tuning 1, library " MOEOPS_VERSION ", L2 " << m.l2_bytes << ", L3 " << m.l3_bytes
       << ", cpu " << std::hex << m.signature << ' ' << m.cpu;
  return line.str();
}

bool parse_dtype(const std::string& name, DType* dtype) {
  for (const DType known : {DType::kF32, DType::kBf16, DType::kS8}) {
    if (name != to_string(known)) continue;
    *dtype = known;
    return true;
  }
  return false;
}

bool parse_line(const std::string& line, TunedShape* shape, TunedPlan* plan) {
  std::istringstream words(line);
  words.imbue(std::locale::classic());
  std::string isa, dtype, kernel;
  words >> isa >> shape->threads >> dtype >> kernel >> shape->panels >> shape->k_chunks >>
      shape->rows >> shape->rows_per_expert >> plan->chunk_rows >> plan->k_block >>
      plan->task_panels;
  if (!words || !parse_isa(isa.c_str(), &shape->isa) || !parse_dtype(dtype, &shape->dtype)) {
    return false;
  }
  shape->kernel = TunedShape::name_of(kernel);
  for (const int64_t number : {plan->chunk_rows, plan->k_block, plan->task_panels}) {
    if (number < 1 || number > kMost) return false;
  }
  for (const int64_t rows : {shape->rows, shape->rows_per_expert}) {
    if (rows != TunedShape::row_class(rows)) return false;
  }
  return true;
}

Status read_text(const char* path, std::string* text) {
  const auto failed = [path](const char* why) {
    return Status(StatusCode::kInvalidArgument, "tuning cache %s: %s", path, why);
  };
  // Not waiting for whoever writes, should it be a pipe.
  const int file = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return failed(std::strerror(errno));
  struct Close {
    int file;
    ~Close() { ::close(file); }
  } const close{file};
  struct stat info;
  if (::fstat(file, &info) != 0) return failed(std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return failed("not a regular file");
  if (info.st_size > kMostBytes) return failed("too long for one");
  text->resize(static_cast<size_t>(info.st_size));
  size_t done = 0;
  while (done < text->size()) {
    const ssize_t count = ::read(file, text->data() + done, text->size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return failed(std::strerror(errno));
    if (count == 0) break;
    done += static_cast<size_t>(count);
  }
  text->resize(done);
  return {};
}

}  // namespace

TunedShape::Name TunedShape::name_of(std::string_view text) {
  Name name = {};
  std::copy_n(text.data(), std::min(text.size(), name.size() - 1), name.data());
  return name;
}

int64_t TunedShape::row_class(int64_t rows) {
  constexpr int64_t kLargest = int64_t{1} << 62;
  return static_cast<int64_t>(
      std::bit_ceil(static_cast<uint64_t>(std::clamp(rows, int64_t{1}, kLargest))));
}

int64_t TunedShape::row_class_of_expert(int64_t rows, int64_t experts) {
  experts = std::max<int64_t>(experts, 1);
  const int64_t mean = rows / experts;
  return row_class(mean * experts < rows ? mean + 1 : mean);
}

const TunedPlan* Tuning::find(const TunedShape& shape) const noexcept {
  const auto it = plans.find(shape);
  return it == plans.end() ? nullptr : &it->second;
}

std::string Tuning::text() const {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << first_line() << "\n"
       << plans.size()
       << " plans: isa threads dtype kernel panels k_chunks rows rows_per_expert, "
          "chunk_rows k_block task_panels\n";
  for (const auto& [shape, plan] : plans) {
    text << to_string(shape.isa) << ' ' << shape.threads << ' ' << to_string(shape.dtype) << ' '
         << shape.kernel.data() << ' ' << shape.panels << ' ' << shape.k_chunks << ' ' << shape.rows
         << ' ' << shape.rows_per_expert << ' ' << plan.chunk_rows << ' ' << plan.k_block << ' '
         << plan.task_panels << '\n';
  }
  return text.str();
}

Status Tuning::parse(const std::string& text, Tuning* tuning) {
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  if (line != first_line()) {
    return {StatusCode::kInvalidArgument, "tuning cache begins '%.100s', not '%.100s'",
            line.c_str(), first_line().c_str()};
  }
  std::getline(lines, line);
  Tuning read;
  for (int number = 3; std::getline(lines, line); ++number) {
    TunedShape shape;
    TunedPlan plan;
    if (!parse_line(line, &shape, &plan)) {
      return {StatusCode::kInvalidArgument, "tuning cache: line %d is no plan: '%.60s'", number,
              line.c_str()};
    }
    read.plans[shape] = plan;
  }
  // Cut off, in another order, with something twice or behind a number: not what was written.
  if (read.text() != text) {
    return {StatusCode::kInvalidArgument, "tuning cache: not as it was written"};
  }
  *tuning = std::move(read);
  return {};
}

Status Tuning::read(const char* path, Tuning* tuning) noexcept {
  try {
    std::string text;
    MOEOPS_RETURN_IF_ERROR(read_text(path, &text));
    return parse(text, tuning);
  } catch (const std::exception& error) {
    return {StatusCode::kOutOfMemory, "tuning cache %s: %s", path, error.what()};
  }
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <moeops/ops/packed_weights.h>
#include <omp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "ops/core/arg_check.h"
#include "ops/grouped_matmul/pack_panel.h"

namespace moeops {

using grouped_matmul_internal::PanelPacker;
using grouped_matmul_internal::PanelSource;

namespace grouped_matmul_internal {
extern const PanelPacker pack_panel_avx512;
extern const PanelPacker pack_panel_avx2;
extern const PanelPacker pack_panel_scalar;
}  // namespace grouped_matmul_internal

namespace {

constexpr int64_t kMaxKOfS8 = 65536;

// Below this many bytes of weights, starting workers costs more than packing.
constexpr int64_t kMinBytesInParallel = int64_t{256} << 10;

// 32, 48 or 64: libxsmm's other widths change a row's bits with the row count.
int padded_width(int64_t columns) { return columns <= 32 ? 32 : columns <= 48 ? 48 : 64; }

constexpr ArgCheck::DTypes kFloats = {DType::kF32, DType::kBf16, DType::kF16};
constexpr ArgCheck::DTypes kFloatsAndS8 = {DType::kF32, DType::kBf16, DType::kF16, DType::kS8};

ArgCheck::DTypes sources_of(DType dtype) { return dtype == DType::kS8 ? kFloatsAndS8 : kFloats; }

bool is_one_scale(const ConstTensorView& w_scale) {
  return w_scale.rank == 1 && w_scale.dim(0) == 1;
}

const PanelPacker& choose_panel_packer(Isa isa) {
  using namespace grouped_matmul_internal;
  for (const PanelPacker* packer : {&pack_panel_avx512, &pack_panel_avx2}) {
    if (packer->isa <= isa) return *packer;
  }
  return pack_panel_scalar;
}

PanelSource::Matrix matrix_of(const ConstTensorView& w, const ConstTensorView& w_scale) {
  // Nothing may be added to the null data that a view without elements may have.
  const bool empty = w.rows() == 0 || w.columns() == 0;
  return {w.data, empty ? 0 : w.row_stride, static_cast<const float*>(w_scale.data),
          is_one_scale(w_scale) ? 0 : 1};
}

const char* no_scale_reason(const ConstTensorView& w) {
  return w.dtype == DType::kS8 ? "the pack has no scales" : "w is not s8";
}

// --- the file: a page of header, then the experts as they lie in memory ---

constexpr int64_t kHeaderBytes = 4096;  // a page, so that the experts keep their alignment
constexpr char kMagic[8] = {'m', 'o', 'e', 'o', 'p', 's', 'P', 'W'};

struct FileHeader {
  char magic[8];
  uint32_t layout_version;
  uint32_t dtype;
  uint32_t role;
  uint32_t gate;
  uint32_t scales;
  uint32_t zero;
  int64_t experts;
  int64_t n;
  int64_t k;
  int64_t expert_bytes;
  int64_t file_bytes;
  uint64_t checksum;  // FNV-1a of all of the above
};
static_assert(sizeof(FileHeader) == 80 && offsetof(FileHeader, checksum) == 72);
// Files hold these numbers.
static_assert(static_cast<int>(DType::kF32) == 1 && static_cast<int>(DType::kBf16) == 2 &&
              static_cast<int>(DType::kS8) == 4);
static_assert(static_cast<int>(WeightRole::kPlain) == 0 &&
              static_cast<int>(WeightRole::kGateUp) == 1);
static_assert(static_cast<int>(Gate::kLeft) == 0 && static_cast<int>(Gate::kRight) == 1 &&
              static_cast<int>(Gate::kInterleaved) == 2);

uint64_t checksum_of(const FileHeader& header) {
  const auto* p = reinterpret_cast<const unsigned char*>(&header);
  uint64_t hash = 0xCBF29CE484222325u;
  for (size_t i = 0; i < offsetof(FileHeader, checksum); ++i) hash = (hash ^ p[i]) * 0x100000001B3u;
  return hash;
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

bool write_all(int fd, const void* data, int64_t bytes) {
  const auto* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd, p, static_cast<size_t>(bytes));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    p += written;
    bytes -= written;
  }
  return true;
}

}  // namespace

// An expert's weights: one matrix, or gate and up apart.
struct PackedWeights::Source {
  const PanelPacker* packer;
  DType dtype;
  bool transposed;
  bool apart;
  PanelSource::Matrix first;
  PanelSource::Matrix up;
};

PackedWeights& PackedWeights::operator=(PackedWeights&& other) noexcept {
  std::swap(form_, other.form_);
  std::swap(panels_, other.panels_);
  std::swap(k_chunks_, other.k_chunks_);
  std::swap(last_width_, other.last_width_);
  std::swap(expert_bytes_, other.expert_bytes_);
  std::swap(scales_offset_, other.scales_offset_);
  std::swap(sums_offset_, other.sums_offset_);
  std::swap(buffer_, other.buffer_);
  std::swap(data_, other.data_);
  std::swap(read_only_, other.read_only_);
  return *this;
}

Status PackedWeights::lay_out(const PackedWeightsForm& form) {
  ArgCheck check("PackedWeights");
  const bool s8 = form.dtype == DType::kS8;
  const bool gate_up = form.role == WeightRole::kGateUp;
  check.require(s8 || form.dtype == DType::kF32 || form.dtype == DType::kBf16,
                "form.dtype = %s is not f32, bf16 or s8", to_string(form.dtype));
  check.require(form.experts >= 0 && form.n >= 0 && form.k >= 0,
                "a size of [%" PRId64 ", %" PRId64 ", %" PRId64 "] is negative", form.experts,
                form.n, form.k);
  check.require(!s8 || form.k <= kMaxKOfS8,
                "form.k = %" PRId64 " is more than %" PRId64 ", beyond which s32 overflows", form.k,
                kMaxKOfS8);
  check.choice("form.role", form.role, WeightRole::kGateUp);
  check.choice("form.gate", form.gate, Gate::kInterleaved);
  check.require(!gate_up || form.n % 2 == 0,
                "form.n = %" PRId64 " is odd: gate and up have as many channels each", form.n);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  const int64_t whole = form.n / kPanelColumns;
  const int64_t rest = form.n % kPanelColumns;
  const int rest_width = gate_up ? 2 * (rest <= 32 ? 16 : 32) : padded_width(rest);
  const int64_t chunk_elements = kChunkBytes / size_of(form.dtype);
  const int64_t chunks = form.k / chunk_elements + (form.k % chunk_elements != 0 ? 1 : 0);
  int64_t padded_n = whole * kPanelColumns;
  int64_t panels_bytes = 0;
  int64_t column_bytes = 0;  // of scales, or of sums
  int64_t expert_bytes = 0;
  int64_t bytes = 0;
  if (__builtin_add_overflow(padded_n, rest > 0 ? rest_width : 0, &padded_n) ||
      __builtin_mul_overflow(padded_n, kChunkBytes, &panels_bytes) ||
      __builtin_mul_overflow(panels_bytes, chunks, &panels_bytes) ||
      __builtin_mul_overflow(padded_n, s8 ? 4 : 0, &column_bytes) ||
      __builtin_add_overflow(panels_bytes, column_bytes, &expert_bytes) ||
      __builtin_add_overflow(expert_bytes, column_bytes, &expert_bytes) ||
      __builtin_mul_overflow(expert_bytes, form.experts, &bytes)) {
    return {StatusCode::kInvalidArgument,
            "PackedWeights: the product of [%" PRId64 ", %" PRId64 ", %" PRId64 "] overflows",
            form.experts, form.n, form.k};
  }
  form_ = form;
  form_.scales = form.scales && s8;
  panels_ = whole + (rest > 0 ? 1 : 0);
  k_chunks_ = chunks;
  last_width_ = rest > 0 ? rest_width : kPanelColumns;
  expert_bytes_ = expert_bytes;
  scales_offset_ = panels_bytes;
  sums_offset_ = panels_bytes + column_bytes;
  return {};
}

Status PackedWeights::create(const PackedWeightsForm& form, PackedWeights* out) {
  PackedWeights fresh;
  MOEOPS_RETURN_IF_ERROR(fresh.lay_out(form));
  MOEOPS_RETURN_IF_ERROR(HugeBuffer::allocate(fresh.bytes(), &fresh.buffer_));
  fresh.data_ = static_cast<char*>(fresh.buffer_.data());
  *out = std::move(fresh);
  return {};
}

std::array<PackedWeights::ChannelRun, 2> PackedWeights::channels(int64_t panel) const {
  const int width = panel_width(panel);
  if (form_.role == WeightRole::kPlain) {
    const int64_t first = panel * kPanelColumns;
    return {{{0, static_cast<int>(std::min<int64_t>(form_.n - first, width)), first, 1}, {}}};
  }
  const int64_t intermediate = form_.n / 2;
  const int64_t first = panel * (kPanelColumns / 2);
  const int half = width / 2;
  const auto count = static_cast<int>(std::min<int64_t>(intermediate - first, half));
  const bool interleaved = form_.gate == Gate::kInterleaved;
  const int64_t step = interleaved ? 2 : 1;
  const int64_t gate = form_.gate == Gate::kRight ? intermediate : 0;
  const int64_t up = interleaved ? 1 : intermediate - gate;
  return {{{0, count, gate + first * step, step}, {half, count, up + first * step, step}}};
}

void PackedWeights::pack_panel(int64_t expert, int64_t panel, const Source& source) {
  if (expert_bytes_ == 0) return;  // without k there is not even memory
  const int width = panel_width(panel);
  PanelSource from = {.dtype = source.dtype,
                      .transposed = source.transposed,
                      .k = form_.k,
                      .runs = channels(panel),
                      .matrices = {source.first, source.first}};
  if (source.apart) {
    for (ChannelRun& run : from.runs) {
      run.channel = panel * (kPanelColumns / 2);
      run.step = 1;
    }
    from.matrices[1] = source.up;
  }
  const bool s8 = form_.dtype == DType::kS8;
  char* expert_data = data_ + expert * expert_bytes_;
  source.packer->run(from,
                     {.dtype = form_.dtype,
                      .width = width,
                      .data = expert_data + panel * panel_bytes(),
                      .scales = s8 ? const_cast<float*>(scales(expert, panel)) : nullptr,
                      .sums = s8 ? const_cast<int32_t*>(column_sums(expert, panel)) : nullptr});
}

void PackedWeights::check_expert(ArgCheck& check, int64_t expert) const {
  check.require(packed(), "nothing was created yet");
  check.require(!read_only_, "the pack is mapped from a file, which is read-only");
  check.require(expert >= 0 && expert < form_.experts,
                "expert = %" PRId64 " is not in [0, %" PRId64 ")", expert, form_.experts);
  if (!check.ok()) return;
  auto* memory = reinterpret_cast<int8_t*>(data_ + expert * expert_bytes_);
  check.output("expert", TensorView(memory, {expert_bytes_}), {DType::kS8}, {expert_bytes_});
}

void PackedWeights::check_matrix(ArgCheck& check, const char* name, const ConstTensorView& w,
                                 int64_t channels, bool transposed, const char* scale_name,
                                 const ConstTensorView& scale) const {
  if (transposed) {
    check.input(name, w, sources_of(form_.dtype), {form_.k, channels});
  } else {
    check.input(name, w, sources_of(form_.dtype), {channels, form_.k});
  }
  if (form_.dtype == DType::kS8 && w.dtype != DType::kS8) {
    check.require(form_.scales, "%s is quantised, but the pack has no scales", name);
  }
  if (form_.scales && w.dtype == DType::kS8) {
    check.input(scale_name, scale, {DType::kF32}, {is_one_scale(scale) ? 1 : channels});
  } else {
    check.absent(scale_name, scale, no_scale_reason(w));
  }
}

void PackedWeights::pack_panels(int64_t expert, Source source, Isa isa) {
  source.packer = &choose_panel_packer(isa);
  for (int64_t panel = 0; panel < panels_; ++panel) pack_panel(expert, panel, source);
}

Status PackedWeights::pack_expert(int64_t expert, const ConstTensorView& w, bool transpose_w,
                                  const ConstTensorView& w_scale) {
  ArgCheck check("PackedWeights::pack_expert");
  check_expert(check, expert);
  check_matrix(check, "w", w, form_.n, transpose_w, "w_scale", w_scale);
  MOEOPS_RETURN_IF_ERROR(check.finish());
  Isa isa = Isa::kScalar;
  MOEOPS_RETURN_IF_ERROR(default_isa(&isa));
  Source source = {};
  source.dtype = w.dtype;
  source.transposed = transpose_w;
  source.first = matrix_of(w, w_scale);
  pack_panels(expert, source, isa);
  return {};
}

Status PackedWeights::pack_expert_halves(int64_t expert, const ConstTensorView& gate,
                                         const ConstTensorView& up, bool transpose_w,
                                         const ConstTensorView& gate_scale,
                                         const ConstTensorView& up_scale) {
  ArgCheck check("PackedWeights::pack_expert_halves");
  check_expert(check, expert);
  check.require(form_.role == WeightRole::kGateUp, "the pack's role is not gate and up");
  check_matrix(check, "gate", gate, form_.n / 2, transpose_w, "gate_scale", gate_scale);
  check_matrix(check, "up", up, form_.n / 2, transpose_w, "up_scale", up_scale);
  check.require(gate.dtype == up.dtype, "gate is %s, but up is %s", to_string(gate.dtype),
                to_string(up.dtype));
  MOEOPS_RETURN_IF_ERROR(check.finish());
  Isa isa = Isa::kScalar;
  MOEOPS_RETURN_IF_ERROR(default_isa(&isa));
  Source source = {};
  source.dtype = gate.dtype;
  source.transposed = transpose_w;
  source.apart = true;
  source.first = matrix_of(gate, gate_scale);
  source.up = matrix_of(up, up_scale);
  pack_panels(expert, source, isa);
  return {};
}

Status PackedWeights::pack(Context& ctx, PackedWeightsForm form, const ConstTensorView& w,
                           bool transpose_w, const ConstTensorView& w_scale, PackedWeights* out) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  ArgCheck check("PackedWeights::pack");
  Dim E{"E"}, N{"N"}, K{"K"};
  Dim& rows = transpose_w ? K : N;
  Dim& columns = transpose_w ? N : K;
  const bool one_expert = w.rank == 2;
  if (one_expert) {
    E.value = 1;
    check.input("w", w, sources_of(form.dtype), {rows, columns});
  } else {
    check.input("w", w, sources_of(form.dtype), {E, rows, columns});
  }
  const bool one_scale = is_one_scale(w_scale);
  if (w.dtype != DType::kS8) {
    check.absent("w_scale", w_scale, no_scale_reason(w));
  } else if (one_expert || one_scale) {
    check.optional_input("w_scale", w_scale, {DType::kF32}, {one_scale ? Extent(1) : Extent(N)});
  } else {
    check.optional_input("w_scale", w_scale, {DType::kF32}, {E, N});
  }
  MOEOPS_RETURN_IF_ERROR(check.finish());

  form.experts = E.value;
  form.n = N.value;
  form.k = K.value;
  form.scales = w.dtype != DType::kS8 || w_scale.present();
  PackedWeights fresh;
  MOEOPS_RETURN_IF_ERROR(create(form, &fresh));
  const PanelPacker* packer = &choose_panel_packer(ctx.isa());
  const int64_t panels = fresh.panels_;
  const int64_t count = fresh.form_.experts * panels;
  const int workers = fresh.bytes() < kMinBytesInParallel ? 1 : ctx.workers();
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t expert = i / panels;
    Source source = {};
    source.packer = packer;
    source.dtype = w.dtype;
    source.transposed = transpose_w;
    source.first = matrix_of(w, w_scale);
    source.first.w = static_cast<const char*>(w.data) +
                     expert * rows.value * source.first.row_stride * size_of(w.dtype);
    if (w_scale.rank == 2) source.first.scales += expert * w_scale.row_stride;
    fresh.pack_panel(expert, i % panels, source);
  }
  *out = std::move(fresh);
  return {};
}

Status PackedWeights::pack(Context& ctx, const ConstTensorView& w, bool transpose_w,
                           PackedWeights* out) {
  return pack(ctx, {.dtype = w.dtype}, w, transpose_w, {}, out);
}

Status PackedWeights::save(const char* path) const {
  ArgCheck check("PackedWeights::save");
  check.require(path != nullptr, "path is null");
  check.require(packed(), "nothing is packed");
  MOEOPS_RETURN_IF_ERROR(check.finish());
  const auto failed = [&](const char* what) {
    return Status(StatusCode::kInvalidArgument, "PackedWeights::save: %s: cannot %s: %s", path,
                  what, std::strerror(errno));
  };

  // Renaming would put a file in the place of a device.
  struct stat info;
  if (::stat(path, &info) == 0 && !S_ISREG(info.st_mode)) {
    return {StatusCode::kInvalidArgument, "PackedWeights::save: %s: not a regular file", path};
  }
  // Its own for every call, so that two of them never write into one file.
  static std::atomic<unsigned> calls{0};
  char beside[4096];
  const int length = std::snprintf(beside, sizeof(beside), "%s.%d.%u.tmp", path,
                                   static_cast<int>(::getpid()), calls.fetch_add(1));
  if (length < 0 || length >= static_cast<int>(sizeof(beside))) {
    errno = ENAMETOOLONG;
    return failed("create a file beside it");
  }

  alignas(FileHeader) char page[kHeaderBytes] = {};
  FileHeader header = {};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.layout_version = kLayoutVersion;
  header.dtype = static_cast<uint32_t>(form_.dtype);
  header.role = static_cast<uint32_t>(form_.role);
  header.gate = static_cast<uint32_t>(form_.gate);
  header.scales = form_.scales ? 1 : 0;
  header.experts = form_.experts;
  header.n = form_.n;
  header.k = form_.k;
  header.expert_bytes = expert_bytes_;
  header.file_bytes = kHeaderBytes + bytes();
  header.checksum = checksum_of(header);
  std::memcpy(page, &header, sizeof(header));

  Descriptor file{::open(beside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)};
  if (file.fd < 0) return failed("create a file beside it");
  const auto give_up = [&](const char* what) {
    const Status status = failed(what);
    ::unlink(beside);
    return status;
  };
  if (!write_all(file.fd, page, kHeaderBytes) || !write_all(file.fd, data_, bytes())) {
    return give_up("write");
  }
  // Before the new name: a name that outlives a crash must not lead to weights that did not.
  if (::fsync(file.fd) != 0) return give_up("write");
  if (::rename(beside, path) != 0) return give_up("replace");
  return {};
}

Status PackedWeights::map(const char* path, PackedWeights* out) {
  if (path == nullptr) {
    return {StatusCode::kInvalidArgument, "PackedWeights::map: path is null"};
  }
  const auto refuse = [&](const char* why) {
    return Status(StatusCode::kInvalidArgument, "PackedWeights::map: %s: %s", path, why);
  };
  // O_NONBLOCK: opening a named pipe must not wait for a writer.
  const Descriptor file{::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) return refuse(std::strerror(errno));
  struct stat info;
  if (::fstat(file.fd, &info) != 0) return refuse(std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return refuse("not a regular file");
  const int64_t file_bytes = info.st_size;
  FileHeader header;
  if (file_bytes < kHeaderBytes ||
      ::pread(file.fd, &header, sizeof(header), 0) != ssize_t{sizeof(header)}) {
    return refuse("too short to be packed weights");
  }
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) return refuse("not packed weights");
  if (header.layout_version != static_cast<uint32_t>(kLayoutVersion)) {
    return {StatusCode::kInvalidArgument,
            "PackedWeights::map: %s: layout version %" PRIu32 ", expected %d: pack it again", path,
            header.layout_version, kLayoutVersion};
  }
  if (header.checksum != checksum_of(header)) return refuse("the header is damaged");
  if (header.file_bytes != file_bytes) {
    return {StatusCode::kInvalidArgument,
            "PackedWeights::map: %s: %" PRId64 " bytes, but its header says %" PRId64, path,
            file_bytes, header.file_bytes};
  }
  // Beyond these the narrower enumerations would hide what the file says.
  if (header.dtype > 255 || header.role > 255 || header.gate > 2 || header.scales > 1) {
    return refuse("the header makes no sense");
  }
  PackedWeights fresh;
  const Status laid_out = fresh.lay_out({.dtype = static_cast<DType>(header.dtype),
                                         .experts = header.experts,
                                         .n = header.n,
                                         .k = header.k,
                                         .role = static_cast<WeightRole>(header.role),
                                         .gate = static_cast<Gate>(header.gate),
                                         .scales = header.scales == 1});
  if (!laid_out.ok()) return refuse(laid_out.message());
  if (fresh.expert_bytes_ != header.expert_bytes || fresh.bytes() != file_bytes - kHeaderBytes) {
    return {StatusCode::kInvalidArgument,
            "PackedWeights::map: %s: %" PRId64 " bytes of weights, expected %" PRId64
            " experts of %" PRId64,
            path,
            file_bytes - kHeaderBytes,
            header.experts,
            fresh.expert_bytes_};
  }
  MOEOPS_RETURN_IF_ERROR(HugeBuffer::map_file(file.fd, file_bytes, &fresh.buffer_));
  fresh.data_ = static_cast<char*>(fresh.buffer_.data()) + kHeaderBytes;
  fresh.read_only_ = true;
  *out = std::move(fresh);
  return {};
}

}  // namespace moeops

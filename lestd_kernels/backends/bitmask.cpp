// Products with a core that stays packed (bitmask.h): blocks, threads, the operators.
//
// Work is cut into blocks by the core alone, each of which one thread computes, and partial sums are
// added in the order of the blocks: a result does not depend on the number of threads.
#include "bitmask.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "packing.h"
#include "rans_lanes.h"

extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));  // null without MKL

namespace lestd {
namespace {

constexpr int64_t kBlocks = 16;          // blocks of rows, or products of tiles: for as many threads
constexpr int64_t kTileBytes = 1 << 21;  // of a dense tile, to stay in a cache of one core
constexpr int64_t kTileTokens = 64;      // tokens for which one such tile is enough
constexpr int64_t kPartTokens = 1024;    // for which expanding a tile again costs next to nothing
constexpr int64_t kMostParts = 4;        // parts of the tokens

#ifdef __x86_64__
#define POPCNT __attribute__((target("popcnt")))  // every x86-64 CPU that PyTorch still runs on
#else
#define POPCNT
#endif

// Paths that this CPU has, the fastest first. What bounds PyTorch's vectors, ATEN_CPU_CAPABILITY,
// bounds ours.
std::vector<std::string> paths() {
  std::vector<std::string> names;
#if defined(HAVE_X86_PATHS)
  const std::string widest = at::get_cpu_capability();
  if (widest == "AVX512" && __builtin_cpu_supports("avx512vbmi2")) names.push_back("avx512");
  if (widest == "AVX512" || widest == "AVX2") names.push_back("avx2");
#elif defined(HAVE_NEON_PATH)
  names.push_back("neon");
#endif
  names.push_back("portable");
  return names;
}

const Path& open_path(c10::string_view name) {
  static const std::vector<std::string> known = paths();
  TORCH_CHECK(std::find(known.begin(), known.end(), name) != known.end(), "this CPU has no path ",
              name, ", expected one of ", known);
#if defined(HAVE_X86_PATHS)
  if (name == "avx512") return kAvx512;
  if (name == "avx2") return kAvx2;
#elif defined(HAVE_NEON_PATH)
  if (name == "neon") return kNeon;
#endif
  return kPortable;
}

Type type_of(const at::Tensor& values) {
  const at::ScalarType type = values.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "values must be float32, bfloat16 or float16, not ", type);
  return type == at::kFloat ? Type::kFloat
      : type == at::kBFloat16 ? Type::kBFloat16 : Type::kHalf;
}

// Number of values among the `left` elements from element `bit` on.
POPCNT int64_t count_values(const Core& core, int64_t bit, int64_t left) {
  if (core.mask == nullptr) return left;
  int64_t step = std::min(-bit & 7, left);  // up to the first whole byte
  int64_t count = __builtin_popcountll(mask_bits(core, bit, step));
  bit += step, left -= step;
  for (; left >= 64; bit += 64, left -= 64) {
    uint64_t word;
    std::memcpy(&word, core.mask + (bit >> 3), 8);
    count += __builtin_popcountll(word);
  }
  for (; left > 0; bit += step, left -= step) {
    step = std::min(kChunk, left);
    count += __builtin_popcountll(mask_bits(core, bit, step));
  }
  return count;
}

Core open_core(
    const at::Tensor& values, const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns) {
  TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values must be 1-D and contiguous");
  Core core{values.const_data_ptr(), type_of(values), nullptr, 0, rows, columns,
            std::vector<int64_t>(rows + 1, columns)};
  core.starts[0] = 0;
  if (mask.has_value()) {
    TORCH_CHECK(mask->dim() == 1 && mask->is_contiguous() && mask->scalar_type() == at::kByte &&
                    mask->numel() == (rows * columns + 7) / 8,
                "mask must be uint8 with one bit per element");
    core.mask = mask->const_data_ptr<uint8_t>();
    core.mask_bytes = mask->numel();
    at::parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        core.starts[r + 1] = count_values(core, r * columns, columns);
    });
  }
  for (int64_t r = 0; r < rows; ++r) core.starts[r + 1] += core.starts[r];
  TORCH_CHECK(core.starts[rows] == values.numel(), "the mask of a core (", rows, " x ", columns,
              ") marks ", core.starts[rows], " elements, expected its ", values.numel(),
              " values; the model's files are damaged, copy them again");
  return core;
}

// Bounds (kBlocks + 1) of blocks of rows that take about the same bytes each.
std::vector<int64_t> block_bounds(const Core& core) {
  const int64_t value_bytes = core.type == Type::kFloat ? 4 : 2;
  const auto bytes = [&](int64_t row) {
    return core.starts[row] * value_bytes + row * (core.columns / 8 + 1);
  };
  std::vector<int64_t> bounds(kBlocks + 1, core.rows);
  int64_t row = 0;
  for (int64_t b = 0; b < kBlocks; ++b) {
    while (bytes(row) < bytes(core.rows) * b / kBlocks) ++row;
    bounds[b] = row;
  }
  return bounds;
}

// x (tokens, n) as float32, each token padded with zeros to `stride` elements.
at::Tensor padded(const at::Tensor& x, int64_t stride) {
  at::Tensor wide = x.new_zeros({x.size(0), stride}, at::kFloat);
  wide.narrow(1, 0, x.size(1)).copy_(x);
  return wide;
}

at::Tensor apply(const at::Tensor& x, const Core& core, bool transposed, const Path& path) {
  const int64_t tokens = x.size(0), stride = (core.columns + kChunk - 1) / kChunk * kChunk;
  const std::vector<int64_t> bounds = block_bounds(core);
  const at::Tensor wide = padded(x, transposed ? stride : core.rows);
  const float* in = wide.const_data_ptr<float>();
  at::Tensor out = wide.new_empty({tokens, transposed ? core.rows : core.columns});
  float* sums = out.mutable_data_ptr<float>();
  if (transposed) {
    at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
      path.multiply(core, true, bounds[begin], bounds[end], tokens, stride, in, sums);
    });
    return out.to(x.scalar_type());
  }
  at::Tensor partial = out.new_empty({kBlocks, tokens, stride});
  float* parts = partial.mutable_data_ptr<float>();
  at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* part = parts + b * tokens * stride;
      std::fill_n(part, tokens * stride, 0.0f);
      path.multiply(core, false, bounds[b], bounds[b + 1], tokens, stride, in, part);
    }
  });
  at::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* sum = parts + t * stride;
      for (int64_t b = 1; b < kBlocks; ++b)
        for (int64_t c = 0; c < core.columns; ++c) sum[c] += sum[b * tokens * stride + c];
      std::copy_n(sum, core.columns, sums + t * core.columns);
    }
  });
  return out.to(x.scalar_type());
}

void check_operands(const at::Tensor& x, const at::Tensor& values, int64_t rows, int64_t columns,
                    bool transposed, bool wide) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == (transposed ? columns : rows), "x must fit the core");
  TORCH_CHECK(x.scalar_type() == values.scalar_type() || (wide && x.scalar_type() == at::kFloat),
              "x must have the dtype of the values", wide ? ", or float32" : "");
}

// x (tokens, rows) M, or with `transposed` x (tokens, columns) M^T, in the dtype of x and values.
at::Tensor bitmask_apply(const at::Tensor& x, const at::Tensor& values,
                         const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns,
                         bool transposed, c10::string_view path) {
  check_operands(x, values, rows, columns, transposed, false);
  return apply(x, open_core(values, mask, rows, columns), transposed, open_path(path));
}

// While it lives, what this thread calls runs on no other: at::mm splits its sums by the number of
// threads that it may have. MKL does so even in a parallel region, where it gets no second one.
struct OneThread {
  const int omp = omp_get_max_threads();
  const int mkl = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;

  OneThread() { omp_set_num_threads(1); }
  ~OneThread() {
    omp_set_num_threads(omp);
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl);
  }
};

// Products tile by tile: each is expanded, and multiplied by at::mm while it is in the cache of the
// thread. A tile spans the whole length of the sums. Many tokens are cut into parts, with wider tiles
// in turn, since each tile reads all of x. Tiles are of the dtype of x.
at::Tensor matmul(const at::Tensor& x, const Core& core, bool transposed, const Path& path) {
  const int64_t length = transposed ? core.columns : core.rows;
  const int64_t width = transposed ? core.rows : core.columns, tokens = x.size(0);
  const int64_t parts = std::clamp(tokens / kPartTokens, int64_t{1}, kMostParts);
  const int64_t part_tokens = (tokens + parts - 1) / parts;
  const int64_t fitting = std::max(part_tokens / kTileTokens, int64_t{1}) * kTileBytes /
                          (length * x.element_size());
  const int64_t most = std::min(fitting, width * parts / kBlocks);
  const int64_t step = std::max(most / kChunk * kChunk, kChunk);
  const int64_t tiles = (width + step - 1) / step;
  std::vector<int64_t> from = core.starts;  // of each row; without `transposed` (tiles, rows)
  if (!transposed) {
    from.resize(tiles * length);
    at::parallel_for(0, length, 64, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        for (int64_t i = 1; i < tiles; ++i)
          from[i * length + r] = from[(i - 1) * length + r] +
                                 count_values(core, r * width + (i - 1) * step, step);
    });
  }
  const bool wide = x.scalar_type() == at::kFloat;
  at::Tensor out = x.new_empty({tokens, width});
  at::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const at::AutoDispatchBelowADInplaceOrView below;  // as the caller, whose guard is its thread's
    const at::Tensor buffer = x.new_empty({length * step});
    void* dense = buffer.mutable_data_ptr();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i / parts, part = i % parts * part_tokens;
      const int64_t first = index * step, count = std::min(step, width - first);
      const at::Tensor tile = buffer.narrow(0, 0, length * count);
      if (i == begin || i % parts == 0) {  // else it is expanded already
        if (transposed)
          path.expand(core, first, first + count, 0, length, from.data() + first, wide, dense);
        else
          path.expand(core, 0, length, first, first + count, from.data() + index * length, wide,
                      dense);
      }
      const at::Tensor M =
          transposed ? tile.view({count, length}).t() : tile.view({length, count});
      at::Tensor product = out.slice(0, part, part + part_tokens).narrow(1, first, count);
      product.addmm_(x.slice(0, part, part + part_tokens), M, 0);
    }
  });
  return out;
}

// As bitmask_apply, for many tokens. In float32, where x is.
at::Tensor bitmask_matmul(const at::Tensor& x, const at::Tensor& values,
                          const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns,
                          bool transposed, c10::string_view path) {
  check_operands(x, values, rows, columns, transposed, true);
  return matmul(x, open_core(values, mask, rows, columns), transposed, open_path(path));
}

at::Tensor bitmask_expand(const at::Tensor& values, const at::Tensor& mask, int64_t rows,
                          int64_t columns, c10::string_view path) {
  const Core core = open_core(values, mask, rows, columns);
  const Path& way = open_path(path);
  at::Tensor dense = values.new_empty({rows, columns});
  char* bytes = static_cast<char*>(dense.mutable_data_ptr());
  const int64_t row_bytes = columns * dense.element_size();
  at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
    way.expand(core, first, last, 0, columns, core.starts.data() + first, false,
               bytes + first * row_bytes);
  });
  return dense;
}

TORCH_LIBRARY(lestd, library) {
  library.def(
      "bitmask_apply(Tensor x, Tensor values, Tensor? mask, int rows, int columns, "
      "bool transposed, str path) -> Tensor");
  library.def(
      "bitmask_matmul(Tensor x, Tensor values, Tensor? mask, int rows, int columns, "
      "bool transposed, str path) -> Tensor");
  library.def(
      "bitmask_expand(Tensor values, Tensor mask, int rows, int columns, str path) -> Tensor");
  library.def("bitmask_paths() -> str[]", paths);
  library.def("packing_counts(Tensor Z, int[] bits) -> int[]");
  library.def("packing_pack(Tensor Z, int bits, bool masked) -> (Tensor, Tensor, int, Tensor)");
  library.def(
      "rans_lanes(Tensor tables, Tensor words, Tensor ends, Tensor states, Tensor row_levels, "
      "Tensor column_levels, Tensor class_of_sum, int precision, str path) -> (Tensor, bool)");
}

TORCH_LIBRARY_IMPL(lestd, CPU, library) {
  library.impl("bitmask_apply", bitmask_apply);
  library.impl("bitmask_matmul", bitmask_matmul);
  library.impl("bitmask_expand", bitmask_expand);
  library.impl("packing_counts", packing_counts);
  library.impl("packing_pack", packing_pack);
  library.impl("rans_lanes", rans_lanes);
}

}  // namespace
}  // namespace lestd

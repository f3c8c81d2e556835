// Products with a core that stays packed (bitmask.h): blocks, threads, the operators.
//
// Work is cut into blocks by the core alone, each of which one thread computes, and partial sums are
// added in the order of the blocks: a result does not depend on the number of threads.
#include "bitmask_paths.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <omp.h>
#include <torch/library.h>

#include <optional>
#include <string>

#define DISPATCH_VALUES(TYPE, NAME, ...)                                                     \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)                   \
                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)                            \
                     AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));  // null without MKL

namespace {

constexpr int64_t kBlocks = 16;          // blocks of rows, or products of tiles: for as many threads
constexpr int64_t kTileBytes = 1 << 21;  // of a dense tile, to stay in a cache of one core
constexpr int64_t kTileTokens = 64;      // tokens for which one such tile is enough
constexpr int64_t kPartTokens = 1024;    // for which expanding a tile again costs next to nothing
constexpr int64_t kMostParts = 4;        // parts of the tokens
constexpr int64_t kRowsAhead = 8;        // how early a row of a tile is asked for

enum class Path { kPortable, kNeon, kAvx2, kAvx512 };

#if defined(HAVE_X86_PATHS)
#define BY_PATH(PATH, ...)                                \
  (PATH == Path::kAvx512 ? avx512::__VA_ARGS__            \
   : PATH == Path::kAvx2 ? avx2::__VA_ARGS__              \
                         : portable::__VA_ARGS__)
#elif defined(HAVE_NEON_PATH)
#define BY_PATH(PATH, ...) (PATH == Path::kNeon ? neon::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define BY_PATH(PATH, ...) portable::__VA_ARGS__
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

Path open_path(c10::string_view name) {
  static const std::vector<std::string> known = paths();
  TORCH_CHECK(std::find(known.begin(), known.end(), name) != known.end(), "this CPU has no path ",
              name, ", expected one of ", known);
  return name == "avx512" ? Path::kAvx512
      : name == "avx2" ? Path::kAvx2 : name == "neon" ? Path::kNeon : Path::kPortable;
}

template <typename T>
Core<T> open_core(
    const at::Tensor& values, const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns) {
  TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values must be 1-D and contiguous");
  const T* first = values.const_data_ptr<T>();
  Core<T> core{first, first + values.numel(), nullptr, 0, rows, columns,
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
template <typename T>
std::vector<int64_t> block_bounds(const Core<T>& core) {
  const auto bytes = [&](int64_t row) {
    return core.starts[row] * int64_t(sizeof(T)) + row * (core.columns / 8 + 1);
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
  at::Tensor wide = at::zeros({x.size(0), stride}, x.options().dtype(at::kFloat));
  wide.narrow(1, 0, x.size(1)).copy_(x);
  return wide;
}

template <typename T>
at::Tensor apply(const at::Tensor& x, const Core<T>& core, bool transposed, Path path) {
  const int64_t tokens = x.size(0), stride = (core.columns + kChunk - 1) / kChunk * kChunk;
  const std::vector<int64_t> bounds = block_bounds(core);
  const at::Tensor wide = padded(x, transposed ? stride : core.rows);
  const float* in = wide.const_data_ptr<float>();
  at::Tensor out = at::empty({tokens, transposed ? core.rows : core.columns}, wide.options());
  float* sums = out.mutable_data_ptr<float>();
  if (transposed) {
    at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
      BY_PATH(path, multiply<true>(core, bounds[begin], bounds[end], tokens, stride, in, sums));
    });
    return out.to(x.scalar_type());
  }
  at::Tensor partial = at::empty({kBlocks, tokens, stride}, out.options());
  float* parts = partial.mutable_data_ptr<float>();
  at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* part = parts + b * tokens * stride;
      std::fill_n(part, tokens * stride, 0.0f);
      BY_PATH(path, multiply<false>(core, bounds[b], bounds[b + 1], tokens, stride, in, part));
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
  return DISPATCH_VALUES(values.scalar_type(), "bitmask_apply", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    return apply(x, core, transposed, open_path(path));
  });
}

// A tile of M, the rows [r0, r1) of the columns [c0, c1), as dense (r1 - r0, c1 - c0). `from`
// (r1 - r0) says where the values of each row of the tile start.
template <typename T, typename Out>
void expand_tile(const Core<T>& core, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                 const int64_t* from, Out* dense, Path path) {
  // What a row of the tile takes, on average. Hardware does not foresee the jump to the next row.
  const int64_t share = (core.starts[core.rows] * (c1 - c0)) / (core.rows * core.columns) + 1;
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t ahead = std::min(r + kRowsAhead, r1 - 1);
    if (core.mask != nullptr) __builtin_prefetch(core.mask + (ahead * core.columns + c0) / 8);
    for (int64_t i = 0; i < share; i += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(core.values + from[ahead - r0] + i);
    const T* value = core.values + from[r - r0];
    BY_PATH(path, expand_row(core, r, c0, c1, value, dense + (r - r0) * (c1 - c0)));
  }
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
// in turn, since each tile reads all of x. Out is T or float.
template <typename Out, typename T>
at::Tensor matmul(const at::Tensor& x, const Core<T>& core, bool transposed, Path path) {
  const int64_t length = transposed ? core.columns : core.rows;
  const int64_t width = transposed ? core.rows : core.columns, tokens = x.size(0);
  const int64_t parts = std::clamp(tokens / kPartTokens, int64_t{1}, kMostParts);
  const int64_t part_tokens = (tokens + parts - 1) / parts;
  const int64_t fitting = std::max(part_tokens / kTileTokens, int64_t{1}) * kTileBytes /
                          (length * int64_t(sizeof(Out)));
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
  at::Tensor out = at::empty({tokens, width}, x.options());
  at::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const at::AutoDispatchBelowADInplaceOrView below;  // as the caller, whose guard is its thread's
    const at::Tensor buffer = at::empty({length * step}, x.options());
    Out* dense = buffer.mutable_data_ptr<Out>();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i / parts, part = i % parts * part_tokens;
      const int64_t first = index * step, count = std::min(step, width - first);
      const at::Tensor tile = buffer.narrow(0, 0, length * count);
      if (i == begin || i % parts == 0) {  // else it is expanded already
        if (transposed)
          expand_tile(core, first, first + count, 0, length, from.data() + first, dense, path);
        else
          expand_tile(core, 0, length, first, first + count, from.data() + index * length, dense,
                      path);
      }
      const at::Tensor M =
          transposed ? tile.view({count, length}).t() : tile.view({length, count});
      at::Tensor product = out.slice(0, part, part + part_tokens).narrow(1, first, count);
      at::mm_out(product, x.slice(0, part, part + part_tokens), M);
    }
  });
  return out;
}

// As bitmask_apply, for many tokens. In float32, where x is.
at::Tensor bitmask_matmul(const at::Tensor& x, const at::Tensor& values,
                          const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns,
                          bool transposed, c10::string_view path) {
  check_operands(x, values, rows, columns, transposed, true);
  return DISPATCH_VALUES(values.scalar_type(), "bitmask_matmul", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    const auto product =
        x.scalar_type() == at::kFloat ? matmul<float, scalar_t> : matmul<scalar_t, scalar_t>;
    return product(x, core, transposed, open_path(path));
  });
}

at::Tensor bitmask_expand(const at::Tensor& values, const at::Tensor& mask, int64_t rows,
                          int64_t columns, c10::string_view path) {
  at::Tensor dense = at::empty({rows, columns}, values.options());
  DISPATCH_VALUES(values.scalar_type(), "bitmask_expand", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    scalar_t* out = dense.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
      expand_tile(core, first, last, 0, columns, core.starts.data() + first,
                  out + first * columns, open_path(path));
    });
  });
  return dense;
}

}  // namespace

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
}

TORCH_LIBRARY_IMPL(lestd, CPU, library) {
  library.impl("bitmask_apply", bitmask_apply);
  library.impl("bitmask_matmul", bitmask_matmul);
  library.impl("bitmask_expand", bitmask_expand);
}

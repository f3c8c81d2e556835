// Products with a core that stays packed (bitmask.h): blocks, threads, the operators.
//
// Work is cut into blocks by the core alone, and partial sums are added in the order of the blocks,
// so a result does not depend on the number of threads, but for what at::mm adds up (many tokens).
#include "bitmask.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

#define DISPATCH_VALUES(TYPE, NAME, ...)                                                     \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)                   \
                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)                            \
                     AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace {

constexpr int64_t kBlocks = 16;            // blocks of rows
constexpr int64_t kTileBytes = 1 << 21;   // of a dense tile, to stay in a cache of one core
constexpr int64_t kRowsAhead = 8;          // how early a row of a tile is asked for
constexpr int64_t kTileTokens = 64;        // tokens for which one such tile is enough

bool fast() {
#ifdef HAVE_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
#endif
  return false;
}

// As multiply_portable, by the path that this CPU has.
template <bool kTransposed, typename T>
void multiply(const Core<T>& core, int64_t first, int64_t last, int64_t tokens, int64_t stride,
              const float* x, float* y, bool portable) {
#ifdef HAVE_AVX512
  for (int64_t t = 0, n; !portable && t < tokens; t += n) {
    const int64_t left = tokens - t;
    const float* x_t = x + t * (kTransposed ? stride : core.rows);
    float* y_t = y + t * (kTransposed ? core.rows : stride);
    n = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto run = n == 8 ? multiply_avx512<kTransposed, 8, T>
        : n == 4 ? multiply_avx512<kTransposed, 4, T>
        : n == 2 ? multiply_avx512<kTransposed, 2, T> : multiply_avx512<kTransposed, 1, T>;
    run(core, first, last, stride, x_t, y_t);
  }
  if (!portable) return;
#endif
  multiply_portable<kTransposed>(core, first, last, tokens, stride, x, y);
}

template <typename T>
Core<T> open_core(
    const at::Tensor& values, const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns) {
  TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values must be 1-D and contiguous");
  Core<T> core{values.const_data_ptr<T>(), nullptr, 0, rows, columns,
               std::vector<int64_t>(rows + 1, columns)};
  core.starts[0] = 0;
  if (mask.has_value()) {
    TORCH_CHECK(mask->dim() == 1 && mask->is_contiguous() && mask->scalar_type() == at::kByte &&
                    mask->numel() == (rows * columns + 7) / 8,
                "mask must be uint8 with one bit per element");
    core.mask = mask->const_data_ptr<uint8_t>();
    core.mask_bytes = mask->numel();
    at::parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) core.starts[r + 1] = row_count(core, r);
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
at::Tensor apply(const at::Tensor& x, const Core<T>& core, bool transposed, bool portable) {
  const int64_t tokens = x.size(0), stride = (core.columns + kChunk - 1) / kChunk * kChunk;
  const std::vector<int64_t> bounds = block_bounds(core);
  const at::Tensor wide = padded(x, transposed ? stride : core.rows);
  const float* in = wide.const_data_ptr<float>();
  at::Tensor out = at::empty({tokens, transposed ? core.rows : core.columns}, wide.options());
  float* sums = out.mutable_data_ptr<float>();
  if (transposed) {
    at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
      multiply<true>(core, bounds[begin], bounds[end], tokens, stride, in, sums, portable);
    });
    return out.to(x.scalar_type());
  }
  at::Tensor partial = at::empty({kBlocks, tokens, stride}, out.options());
  float* parts = partial.mutable_data_ptr<float>();
  at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* part = parts + b * tokens * stride;
      std::fill_n(part, tokens * stride, 0.0f);
      multiply<false>(core, bounds[b], bounds[b + 1], tokens, stride, in, part, portable);
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
                    bool transposed) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == (transposed ? columns : rows), "x must fit the core");
  TORCH_CHECK(x.scalar_type() == values.scalar_type(), "x must have the dtype of the values");
}

// x (tokens, rows) M, or with `transposed` x (tokens, columns) M^T, in the dtype of x and values.
at::Tensor bitmask_apply(const at::Tensor& x, const at::Tensor& values,
                         const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns,
                         bool transposed, bool portable) {
  check_operands(x, values, rows, columns, transposed);
  return DISPATCH_VALUES(values.scalar_type(), "bitmask_apply", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    return apply(x, core, transposed, portable || !fast());
  });
}

// A tile of M, the rows [r0, r1) of the columns [c0, c1), as dense (r1 - r0, c1 - c0). `cursor`
// (rows) says where the values of each row go on, and is moved past them.
template <typename T>
void expand_tile(const Core<T>& core, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                 int64_t* cursor, T* dense, bool portable) {
  // What a row of the tile takes, on average. Hardware does not foresee the jump to the next row.
  const int64_t share = (core.starts[core.rows] * (c1 - c0)) / (core.rows * core.columns) + 1;
  at::parallel_for(r0, r1, 16, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T* value = core.values + cursor[r];
      const int64_t ahead = std::min(r + kRowsAhead, r1 - 1);
      __builtin_prefetch(core.mask + (ahead * core.columns + c0) / 8);
      for (int64_t i = 0; i < share; i += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(core.values + cursor[ahead] + i);
      T* out = dense + (r - r0) * (c1 - c0);
#ifdef HAVE_AVX512
      if (!portable) {
        cursor[r] += expand_avx512(core, r, c0, c1, value, out);
        continue;
      }
#endif
      cursor[r] += expand_portable(core, r, c0, c1, value, out);
    }
  });
}

// As bitmask_apply, for many tokens: tile by tile is expanded and multiplied by at::mm, while it
// is in the cache. A tile spans the whole length of the sums.
at::Tensor bitmask_matmul(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask,
                          int64_t rows, int64_t columns, bool transposed, bool portable) {
  check_operands(x, values, rows, columns, transposed);
  at::Tensor out = at::empty({x.size(0), transposed ? rows : columns}, x.options());
  DISPATCH_VALUES(values.scalar_type(), "bitmask_matmul", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    std::vector<int64_t> cursor = core.starts;
    const int64_t length = transposed ? columns : rows, width = transposed ? rows : columns;
    // With the tokens grows what reading x again for each tile costs.
    const int64_t bytes = kTileBytes * std::max(x.size(0) / kTileTokens, int64_t{1});
    const int64_t fitting = bytes / (length * int64_t(sizeof(scalar_t))) / kChunk * kChunk;
    const int64_t step = std::min(std::max(fitting, kChunk), width);
    at::Tensor tile = at::empty({length * step}, values.options());
    scalar_t* dense = tile.mutable_data_ptr<scalar_t>();
    for (int64_t first = 0; first < width; first += step) {
      const int64_t count = std::min(step, width - first), last = first + count;
      at::Tensor M = tile.narrow(0, 0, length * count);
      if (transposed)
        expand_tile(core, first, last, 0, columns, cursor.data(), dense, portable || !fast());
      else
        expand_tile(core, 0, rows, first, last, cursor.data(), dense, portable || !fast());
      at::Tensor part = out.narrow(1, first, count);
      at::mm_out(part, x, transposed ? M.view({count, length}).t() : M.view({length, count}));
    }
  });
  return out;
}

at::Tensor bitmask_expand(const at::Tensor& values, const at::Tensor& mask, int64_t rows,
                          int64_t columns, bool portable) {
  at::Tensor dense = at::empty({rows, columns}, values.options());
  DISPATCH_VALUES(values.scalar_type(), "bitmask_expand", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    std::vector<int64_t> cursor = core.starts;
    scalar_t* out = dense.mutable_data_ptr<scalar_t>();
    expand_tile(core, 0, rows, 0, columns, cursor.data(), out, portable || !fast());
  });
  return dense;
}

}  // namespace

TORCH_LIBRARY(lestd, library) {
  library.def(
      "bitmask_apply(Tensor x, Tensor values, Tensor? mask, int rows, int columns, "
      "bool transposed, bool portable) -> Tensor");
  library.def(
      "bitmask_matmul(Tensor x, Tensor values, Tensor mask, int rows, int columns, "
      "bool transposed, bool portable) -> Tensor");
  library.def(
      "bitmask_expand(Tensor values, Tensor mask, int rows, int columns, bool portable) -> Tensor");
  library.def("bitmask_is_fast() -> bool", [] { return fast(); });
}

TORCH_LIBRARY_IMPL(lestd, CPU, library) {
  library.impl("bitmask_apply", bitmask_apply);
  library.impl("bitmask_matmul", bitmask_matmul);
  library.impl("bitmask_expand", bitmask_expand);
}

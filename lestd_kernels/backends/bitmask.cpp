// Products with a core that stays packed: a bitmask and the non-zero values, both row-major.
//
// Element (r, c) of M (rows x columns) is a value where bit r * columns + c of the mask is set,
// lowest bit first (lestd_kernels/codecs.py). Where the values of each row start is counted from
// the mask in every call: one popcount per 64 elements, and no state that could become stale.
//
// Work is cut into blocks of rows by the core alone, and partial sums are added in the order of
// the blocks, so a result does not depend on the number of threads. Sums are in float32.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX512 1
#define POPCNT __attribute__((target("popcnt")))  // every x86-64 CPU that PyTorch still runs on
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi2")))
#define AVX512_INLINE AVX512 inline __attribute__((always_inline))
#else
#define POPCNT
#endif

#define DISPATCH_VALUES(TYPE, NAME, ...)                                                     \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)                   \
                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)                            \
                     AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace {

constexpr int64_t kChunk = 32;       // elements of a row that are expanded at a time
constexpr int64_t kBlocks = 16;      // blocks of rows
constexpr int kRows = 4;             // rows that share one pass over the output of x M
constexpr int64_t kPrefetch = 16384;  // bytes ahead of the values being read

template <typename T>
struct Core {
  const T* values;
  const uint8_t* mask;  // null: every element is a value
  int64_t mask_bytes, rows, columns;
  std::vector<int64_t> starts;  // (rows + 1): where the values of each row start
};

// The `count` <= 56 bits of the mask from `bit` on, in the low bits.
template <typename T>
inline __attribute__((always_inline)) uint64_t mask_bits(
    const Core<T>& core, int64_t bit, int64_t count) {
  if (core.mask == nullptr) return (uint64_t{1} << count) - 1;
  const int64_t byte = bit >> 3, left = core.mask_bytes - byte;
  uint64_t word = 0;
  if (left >= 8)
    std::memcpy(&word, core.mask + byte, 8);
  else
    std::memcpy(&word, core.mask + byte, left);
  return word >> (bit & 7) & ((uint64_t{1} << count) - 1);
}

// Number of values in a row.
template <typename T>
POPCNT int64_t row_count(const Core<T>& core, int64_t row) {
  int64_t bit = row * core.columns, left = core.columns;
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

// ---- any CPU: one non-zero at a time ------------------------------------------------------

template <typename T, typename F>
inline void for_each_value(const Core<T>& core, int64_t row, const F& f) {
  const T* value = core.values + core.starts[row];
  for (int64_t c = 0; c < core.columns; c += kChunk) {
    uint32_t bits =
        mask_bits(core, row * core.columns + c, std::min(kChunk, core.columns - c));
    for (; bits; bits &= bits - 1) f(c + __builtin_ctz(bits), *value++);
  }
}

// Over the rows [first, last): y (tokens, stride) += x (tokens, rows) M, or with kTransposed
// y (tokens, rows) = x (tokens, stride) M^T.
template <bool kTransposed, typename T>
void multiply_portable(const Core<T>& core, int64_t first, int64_t last, int64_t tokens,
                       int64_t stride, const float* x, float* y) {
  for (int64_t r = first; r < last; ++r) {
    for (int64_t t = 0; kTransposed && t < tokens; ++t) y[t * core.rows + r] = 0;
    for_each_value(core, r, [&](int64_t c, T value) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t narrow = t * core.rows + r, wide = t * stride + c;
        const int64_t from = kTransposed ? wide : narrow, to = kTransposed ? narrow : wide;
        y[to] += x[from] * static_cast<float>(value);
      }
    });
  }
}

// dense (rows, columns) = M, over the rows [first, last); `dense` holds zeros.
template <typename T>
void expand_portable(const Core<T>& core, int64_t first, int64_t last, T* dense) {
  for (int64_t r = first; r < last; ++r)
    for_each_value(core, r, [&](int64_t c, T value) { dense[r * core.columns + c] = value; });
}

// ---- AVX-512: 32 elements at a time, zeros included -----------------------------------------

#ifdef HAVE_AVX512
// Expand the values that `bits` tells of to 2 x 16 floats, and step over them.
AVX512_INLINE void expand_chunk(uint32_t bits, const float*& value, __m512& low, __m512& high) {
  low = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits), value);
  value += __builtin_popcount(bits & 0xffff);
  high = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits >> 16), value);
  value += __builtin_popcount(bits >> 16);
}

AVX512_INLINE __m512i expand_chunk_16(uint32_t bits, const void* value) {
  return _mm512_maskz_expandloadu_epi16(bits, value);
}

AVX512_INLINE __m512 widen(__m256i half, const c10::BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512_INLINE __m512 widen(__m256i half, const c10::Half*) { return _mm512_cvtph_ps(half); }

template <typename T>
AVX512_INLINE void expand_chunk(uint32_t bits, const T*& value, __m512& low, __m512& high) {
  const __m512i chunk = expand_chunk_16(bits, value);
  low = widen(_mm512_castsi512_si256(chunk), value);
  high = widen(_mm512_extracti64x4_epi64(chunk, 1), value);
  value += __builtin_popcount(bits);
}

AVX512_INLINE void prefetch(const void* value) {
  _mm_prefetch(static_cast<const char*>(value) + kPrefetch, _MM_HINT_T0);
}

// kRows_ rows and N tokens of y += x M: one pass over y.
template <int kRows_, int N, typename T>
AVX512 void multiply_rows(const Core<T>& core, int64_t row, int64_t stride, const float* x,
                          float* y) {
  const T* value[kRows_];
  for (int i = 0; i < kRows_; ++i) value[i] = core.values + core.starts[row + i];
  for (int64_t c = 0; c < core.columns; c += kChunk) {
    const int64_t count = std::min(kChunk, core.columns - c);
    __m512 low[N], high[N];
    for (int t = 0; t < N; ++t) {
      low[t] = _mm512_loadu_ps(y + t * stride + c);
      high[t] = _mm512_loadu_ps(y + t * stride + c + 16);
    }
    for (int i = 0; i < kRows_; ++i) {
      __m512 a, b;
      prefetch(value[i]);
      expand_chunk(mask_bits(core, (row + i) * core.columns + c, count), value[i], a, b);
      for (int t = 0; t < N; ++t) {
        const __m512 scale = _mm512_set1_ps(x[t * core.rows + row + i]);
        low[t] = _mm512_fmadd_ps(scale, a, low[t]);
        high[t] = _mm512_fmadd_ps(scale, b, high[t]);
      }
    }
    for (int t = 0; t < N; ++t) {
      _mm512_storeu_ps(y + t * stride + c, low[t]);
      _mm512_storeu_ps(y + t * stride + c + 16, high[t]);
    }
  }
}

// One row and N tokens of y = x M^T.
template <int N, typename T>
AVX512 void multiply_row_transposed(const Core<T>& core, int64_t row, int64_t stride,
                                    const float* x, float* y) {
  const T* value = core.values + core.starts[row];
  __m512 low[N], high[N];
  for (int t = 0; t < N; ++t) low[t] = high[t] = _mm512_setzero_ps();
  for (int64_t c = 0; c < core.columns; c += kChunk) {
    const int64_t count = std::min(kChunk, core.columns - c);
    prefetch(value);
    __m512 a, b;
    expand_chunk(mask_bits(core, row * core.columns + c, count), value, a, b);
    for (int t = 0; t < N; ++t) {
      low[t] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + t * stride + c), low[t]);
      high[t] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + t * stride + c + 16), high[t]);
    }
  }
  for (int t = 0; t < N; ++t)
    y[t * core.rows + row] = _mm512_reduce_add_ps(low[t] + high[t]);
}

// As multiply_portable, for N tokens.
template <bool kTransposed, int N, typename T>
void multiply_avx512(const Core<T>& core, int64_t first, int64_t last, int64_t stride,
                     const float* x, float* y) {
  int64_t r = first;
  if constexpr (kTransposed) {
    for (; r < last; ++r) multiply_row_transposed<N>(core, r, stride, x, y);
  } else {
    for (; r + kRows <= last; r += kRows) multiply_rows<kRows, N>(core, r, stride, x, y);
    for (; r < last; ++r) multiply_rows<1, N>(core, r, stride, x, y);
  }
}

AVX512_INLINE int64_t expand_into(uint32_t bits, const float* value, float* dense, uint32_t where) {
  __m512 low, high;
  const float* next = value;
  expand_chunk(bits, next, low, high);
  _mm512_mask_storeu_ps(dense, static_cast<__mmask16>(where), low);
  _mm512_mask_storeu_ps(dense + 16, static_cast<__mmask16>(where >> 16), high);
  return next - value;
}

template <typename T>
AVX512_INLINE int64_t expand_into(uint32_t bits, const T* value, T* dense, uint32_t where) {
  _mm512_mask_storeu_epi16(dense, where, expand_chunk_16(bits, value));
  return __builtin_popcount(bits);
}

template <typename T>
AVX512 void expand_avx512(const Core<T>& core, int64_t first, int64_t last, T* dense) {
  for (int64_t r = first; r < last; ++r) {
    const T* value = core.values + core.starts[r];
    for (int64_t c = 0; c < core.columns; c += kChunk) {
      const int64_t place = r * core.columns + c, count = std::min(kChunk, core.columns - c);
      const uint32_t where = count < kChunk ? (1u << count) - 1u : ~0u;
      value += expand_into(mask_bits(core, place, count), value, dense + place, where);
    }
  }
}
#endif  // HAVE_AVX512

// ---- the choice between the two, blocks, threads --------------------------------------------

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
  TORCH_CHECK(core.starts[rows] == values.numel(), "the mask tells of ", core.starts[rows],
              " values, there are ", values.numel());
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

// x (tokens, rows) M, or with `transposed` x (tokens, columns) M^T, in the dtype of x and values.
at::Tensor bitmask_apply(const at::Tensor& x, const at::Tensor& values,
                         const std::optional<at::Tensor>& mask, int64_t rows, int64_t columns,
                         bool transposed, bool portable) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == (transposed ? columns : rows), "x must fit the core");
  TORCH_CHECK(x.scalar_type() == values.scalar_type(), "x must have the dtype of the values");
  return DISPATCH_VALUES(values.scalar_type(), "bitmask_apply", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    return apply(x, core, transposed, portable || !fast());
  });
}

at::Tensor bitmask_expand(const at::Tensor& values, const at::Tensor& mask, int64_t rows,
                          int64_t columns, bool portable) {
  const bool wide = !portable && fast();
  at::Tensor dense = wide ? at::empty({rows, columns}, values.options())
                          : at::zeros({rows, columns}, values.options());
  DISPATCH_VALUES(values.scalar_type(), "bitmask_expand", [&] {
    const Core<scalar_t> core = open_core<scalar_t>(values, mask, rows, columns);
    scalar_t* out = dense.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
#ifdef HAVE_AVX512
      if (wide) return expand_avx512(core, first, last, out);
#endif
      expand_portable(core, first, last, out);
    });
  });
  return dense;
}

}  // namespace

TORCH_LIBRARY(lestd, library) {
  library.def(
      "bitmask_apply(Tensor x, Tensor values, Tensor? mask, int rows, int columns, "
      "bool transposed, bool portable) -> Tensor");
  library.def(
      "bitmask_expand(Tensor values, Tensor mask, int rows, int columns, bool portable) -> Tensor");
  library.def("bitmask_is_fast() -> bool", [] { return fast(); });
}

TORCH_LIBRARY_IMPL(lestd, CPU, library) {
  library.impl("bitmask_apply", bitmask_apply);
  library.impl("bitmask_expand", bitmask_expand);
}

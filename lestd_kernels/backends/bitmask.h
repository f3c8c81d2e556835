// Products with a core that stays packed: a bitmask and the non-zero values, both row-major.
//
// Element (r, c) of M (rows x columns) is a value where bit r * columns + c of the mask is set,
// lowest bit first (lestd_kernels/codecs.py). Where the values of each row start is counted from
// the mask in every call: one popcount per 64 elements, and no state that could become stale.
//
// Here: what one thread does over a range of rows, for any CPU and for AVX-512. Sums are in float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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

namespace {

constexpr int64_t kChunk = 32;       // elements of a row that are expanded at a time
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

// dense (last - first) = the columns [first, last) of a row, whose values start at `value`; returns
// their number.
template <typename T>
int64_t expand_portable(const Core<T>& core, int64_t row, int64_t first, int64_t last,
                        const T* value, T* dense) {
  const T* start = value;
  std::fill_n(dense, last - first, T(0));
  for (int64_t c = first; c < last; c += kChunk) {
    uint32_t bits = mask_bits(core, row * core.columns + c, std::min(kChunk, last - c));
    for (; bits; bits &= bits - 1) dense[c - first + __builtin_ctz(bits)] = *value++;
  }
  return value - start;
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

// As expand_portable.
template <typename T>
AVX512 int64_t expand_avx512(const Core<T>& core, int64_t row, int64_t first, int64_t last,
                             const T* value, T* dense) {
  const T* start = value;
  for (int64_t c = first; c < last; c += kChunk) {
    const int64_t count = std::min(kChunk, last - c);
    const uint32_t where = count < kChunk ? (1u << count) - 1u : ~0u;
    value += expand_into(mask_bits(core, row * core.columns + c, count), value,
                         dense + c - first, where);
  }
  return value - start;
}
#endif  // HAVE_AVX512

}  // namespace

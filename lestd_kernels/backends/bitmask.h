// Products with a core that stays packed: a bitmask and the non-zero values, both row-major.
//
// Element (r, c) of M (rows x columns) is a value where bit r * columns + c of the mask is set,
// lowest bit first (lestd_kernels/storage/codecs.py). Where the values of each row start is counted from
// the mask in every call: one popcount per 64 elements, and no state that could become stale.
//
// Here: the core, and what one thread does over a range of rows on any CPU. bitmask_paths.h has the
// same for CPUs whose vectors we know. Sums are in float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#define POPCNT __attribute__((target("popcnt")))  // every x86-64 CPU that PyTorch still runs on
#else
#define POPCNT
#endif

namespace {

constexpr int64_t kChunk = 32;  // elements of a row that are expanded at a time

template <typename T>
struct Core {
  const T* values;
  const T* end;         // of the values
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

// Number of values among the `left` elements from element `bit` on.
template <typename T>
POPCNT int64_t count_values(const Core<T>& core, int64_t bit, int64_t left) {
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

namespace portable {  // one non-zero at a time

// Over the rows [first, last): y (tokens, stride) += x (tokens, rows) M, or with kTransposed
// y (tokens, rows) = x (tokens, stride) M^T. Rows of `stride` elements are padded to whole chunks.
template <bool kTransposed, typename T>
void multiply(const Core<T>& core, int64_t first, int64_t last, int64_t tokens, int64_t stride,
              const float* x, float* y) {
  for (int64_t r = first; r < last; ++r) {
    const T* value = core.values + core.starts[r];
    for (int64_t t = 0; kTransposed && t < tokens; ++t) y[t * core.rows + r] = 0;
    for (int64_t c = 0; c < core.columns; c += kChunk) {
      uint32_t bits = mask_bits(core, r * core.columns + c, std::min(kChunk, core.columns - c));
      for (; bits; bits &= bits - 1, ++value) {
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t narrow = t * core.rows + r, wide = t * stride + c + __builtin_ctz(bits);
          const int64_t from = kTransposed ? wide : narrow, to = kTransposed ? narrow : wide;
          y[to] += x[from] * static_cast<float>(*value);
        }
      }
    }
  }
}

// dense (last - first) = the columns [first, last) of a row, whose values start at `value`. Out is
// T or float.
template <typename T, typename Out>
void expand_row(const Core<T>& core, int64_t row, int64_t first, int64_t last, const T* value,
                Out* dense) {
  std::fill_n(dense, last - first, Out(0));
  for (int64_t c = first; c < last; c += kChunk) {
    uint32_t bits = mask_bits(core, row * core.columns + c, std::min(kChunk, last - c));
    for (; bits; bits &= bits - 1) dense[c - first + __builtin_ctz(bits)] = *value++;
  }
}

}  // namespace portable

}  // namespace

// Products with a core that stays packed: a bitmask and the non-zero values, both row-major.
//
// Element (r, c) of M (rows x columns) is a value where bit r * columns + c of the mask is set,
// lowest bit first (lestd_kernels/storage/codecs.py). Where the values of each row start is counted from
// the mask in every call: one popcount per 64 elements, and no state that could become stale.
//
// Here: the core, and what a path of the kernel does, on one thread. Paths are for CPUs with certain
// vector instructions, each in a file of its own (bitmask_avx2.cpp, ...), so that they are compiled
// at the same time, and without PyTorch's headers, which cost most. Sums are in float32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_PATHS 1
#elif defined(__aarch64__) && defined(__GNUC__)
#define HAVE_NEON_PATH 1
#endif

namespace lestd {

constexpr int64_t kChunk = 32;  // elements of a row that are expanded at a time

enum class Type { kFloat, kBFloat16, kHalf };

struct Core {
  const void* values;
  Type type;            // of the values
  const uint8_t* mask;  // null: every element is a value
  int64_t mask_bytes, rows, columns;
  std::vector<int64_t> starts;  // (rows + 1): where the values of each row start
};

struct Path {
  // Over the rows [first, last): y (tokens, stride) += x (tokens, rows) M, or with `transposed`
  // y (tokens, rows) = x (tokens, stride) M^T. Rows of `stride` elements are padded to whole chunks.
  void (*multiply)(const Core& core, bool transposed, int64_t first, int64_t last, int64_t tokens,
                   int64_t stride, const float* x, float* y);

  // A tile of M, the rows [r0, r1) of the columns [c0, c1), as dense (r1 - r0, c1 - c0), of the type
  // of the values or, if `wide`, float. `from` (r1 - r0) says where the values of each row of the
  // tile start.
  void (*expand)(const Core& core, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                 const int64_t* from, bool wide, void* dense);
};

extern const Path kPortable, kAvx2, kAvx512, kNeon;

template <typename T>
const T* values_at(const Core& core, int64_t index) {
  return static_cast<const T*>(core.values) + index;
}

// The `count` <= 56 bits of the mask from `bit` on, in the low bits.
inline __attribute__((always_inline)) uint64_t mask_bits(
    const Core& core, int64_t bit, int64_t count) {
  if (core.mask == nullptr) return (uint64_t{1} << count) - 1;
  const int64_t byte = bit >> 3, left = core.mask_bytes - byte;
  uint64_t word = 0;
  if (left >= 8)
    std::memcpy(&word, core.mask + byte, 8);
  else
    std::memcpy(&word, core.mask + byte, left);
  return word >> (bit & 7) & ((uint64_t{1} << count) - 1);
}

// Values below element `lane` of those that `bits` tells of.
inline __attribute__((always_inline)) int values_below(uint32_t bits, int lane) {
  return __builtin_popcount(bits & ((1u << lane) - 1));
}

#define UNROLL _Pragma("GCC unroll 8")

}  // namespace lestd

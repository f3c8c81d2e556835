// The path for any CPU: one non-zero at a time.
#include "bitmask.h"

namespace lestd {
namespace {

template <bool kTransposed, typename T>
void multiply(const Core& core, int64_t first, int64_t last, int64_t tokens, int64_t stride,
              const float* x, float* y) {
  for (int64_t r = first; r < last; ++r) {
    const T* value = values_at<T>(core, core.starts[r]);
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

template <typename T, typename Out>
void expand_row(const Core& core, int64_t row, int64_t first, int64_t last, const T* value,
                Out* dense) {
  std::fill_n(dense, last - first, Out(0));
  for (int64_t c = first; c < last; c += kChunk) {
    uint32_t bits = mask_bits(core, row * core.columns + c, std::min(kChunk, last - c));
    for (; bits; bits &= bits - 1) dense[c - first + __builtin_ctz(bits)] = *value++;
  }
}

#include "bitmask_path.h"

}  // namespace

const Path kPortable = kPath;

}  // namespace lestd

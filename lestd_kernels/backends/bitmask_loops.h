// The loops of one path: 32 elements of a row at a time, zeros included. bitmask_paths.h includes this
// file once for each path, in a namespace of its own, after it has defined there:
//
//   TARGET       the instructions that its functions may use; TARGET_INLINE, that they are inlined
//   kLanes       floats in a vector
//   kTokens      tokens that share one expansion
//   kReadsAhead  whether `expand` reads 32 values however few the mask tells of
//   expand       32 values to the places of the bits, the others zero, as kParts vectors of floats
//   expand_16    32 values in 16 bits, as they are

constexpr int kRows = 4;              // rows that share one pass over the output of x M
constexpr int64_t kPrefetch = 16384;  // bytes ahead of the values being read

template <typename T, typename Out>
TARGET_INLINE void expand(uint32_t bits, const T* value, Out* out) {
  if constexpr (sizeof(Out) == 2) {
    expand_16(bits, value, out);
  } else {
    Floats parts[kParts];
    expand(bits, value, parts);
    std::memcpy(out, parts, sizeof(parts));
  }
}

// `expand`, and step over the values.
template <typename T, typename Out>
TARGET_INLINE void take(const Core<T>& core, int64_t bit, int64_t count, const T*& value, Out* out) {
  const uint32_t bits = mask_bits(core, bit, count);
  if (kReadsAhead && core.end - value < kChunk) {
    T last[kChunk];
    std::memset(static_cast<void*>(last), 0, sizeof(last));
    std::copy(value, core.end, last);
    expand(bits, last, out);
  } else {
    expand(bits, value, out);
  }
  value += __builtin_popcount(bits);
}

// kRows_ rows and N tokens of y += x M: one pass over y.
template <int kRows_, int N, typename T>
TARGET void multiply_rows(const Core<T>& core, int64_t row, int64_t stride, const float* x,
                          float* y) {
  const T* value[kRows_];
  for (int i = 0; i < kRows_; ++i) value[i] = core.values + core.starts[row + i];
  for (int64_t c = 0; c < core.columns; c += kChunk) {
    const int64_t count = std::min(kChunk, core.columns - c);
    Floats sums[N][kParts], chunk[kParts];
    for (int t = 0; t < N; ++t) std::memcpy(sums[t], y + t * stride + c, sizeof(chunk));
    for (int i = 0; i < kRows_; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(value[i]) + kPrefetch);
      take(core, (row + i) * core.columns + c, count, value[i], chunk);
      for (int t = 0; t < N; ++t)
        for (int p = 0; p < kParts; ++p) sums[t][p] += x[t * core.rows + row + i] * chunk[p];
    }
    for (int t = 0; t < N; ++t) std::memcpy(y + t * stride + c, sums[t], sizeof(chunk));
  }
}

// One row and N tokens of y = x M^T.
template <int N, typename T>
TARGET void multiply_row_transposed(const Core<T>& core, int64_t row, int64_t stride,
                                    const float* x, float* y) {
  const T* value = core.values + core.starts[row];
  Floats sums[N][kParts] = {}, chunk[kParts], scale[kParts];
  for (int64_t c = 0; c < core.columns; c += kChunk) {
    __builtin_prefetch(reinterpret_cast<const char*>(value) + kPrefetch);
    take(core, row * core.columns + c, std::min(kChunk, core.columns - c), value, chunk);
    for (int t = 0; t < N; ++t) {
      std::memcpy(scale, x + t * stride + c, sizeof(scale));
      for (int p = 0; p < kParts; ++p) sums[t][p] += chunk[p] * scale[p];
    }
  }
  for (int t = 0; t < N; ++t) {
    float lanes[kLanes];
    for (int p = 1; p < kParts; ++p) sums[t][0] += sums[t][p];
    std::memcpy(lanes, sums[t], sizeof(lanes));
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    y[t * core.rows + row] = lanes[0];
  }
}

// As portable::multiply.
template <bool kTransposed, int N = kTokens, typename T>
void multiply(const Core<T>& core, int64_t first, int64_t last, int64_t tokens, int64_t stride,
              const float* x, float* y) {
  for (; tokens >= N; tokens -= N) {
    int64_t r = first;
    if constexpr (kTransposed) {
      for (; r < last; ++r) multiply_row_transposed<N>(core, r, stride, x, y);
    } else {
      for (; r + kRows <= last; r += kRows) multiply_rows<kRows, N>(core, r, stride, x, y);
      for (; r < last; ++r) multiply_rows<1, N>(core, r, stride, x, y);
    }
    x += N * (kTransposed ? stride : core.rows);
    y += N * (kTransposed ? core.rows : stride);
  }
  if constexpr (N > 1) multiply<kTransposed, N / 2>(core, first, last, tokens, stride, x, y);
}

// As portable::expand_row.
template <typename T, typename Out>
TARGET void expand_row(const Core<T>& core, int64_t row, int64_t first, int64_t last,
                       const T* value, Out* dense) {
  for (int64_t c = first; c < last; c += kChunk) {
    const int64_t bit = row * core.columns + c, count = std::min(kChunk, last - c);
    if (count == kChunk) {
      take(core, bit, kChunk, value, dense + c - first);
    } else {
      Out chunk[kChunk];
      take(core, bit, count, value, chunk);
      std::copy_n(chunk, count, dense + c - first);
    }
  }
}

#undef TARGET
#undef TARGET_INLINE

// The loops of a path with vectors: 32 elements of a row at a time, zeros included. Defined before:
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

// Whether the rows before `last` are far enough from the end of the core to read whole words and
// chunks, and if so, whether a mask is to be read at all.
enum class Place { kEdge, kMasked, kDense };

inline Place place_of(const Core& core, int64_t last) {
  const bool room = !kReadsAhead || core.starts[last] + kChunk <= core.starts[core.rows];
  if (room && core.mask == nullptr) return Place::kDense;
  const bool words = core.mask != nullptr && last * core.columns / 8 + 8 <= core.mask_bytes;
  return room && words ? Place::kMasked : Place::kEdge;
}

// The function for a place, with further template arguments.
#define BY_PLACE(PLACE, FUNCTION, ...)                         \
  (PLACE == Place::kMasked  ? FUNCTION<Place::kMasked, __VA_ARGS__> \
   : PLACE == Place::kDense ? FUNCTION<Place::kDense, __VA_ARGS__>  \
                            : FUNCTION<Place::kEdge, __VA_ARGS__>)

// Expand the `count` elements from element `bit` on, and step over their values. `mask` is that of
// the core, kept in a register.
template <Place kPlace, typename T, typename Out>
TARGET_INLINE void take(const Core& core, const uint8_t* mask, int64_t bit, int64_t count,
                        const T*& value, Out* out) {
  uint32_t bits = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if (kPlace == Place::kMasked) {
    uint64_t word;
    std::memcpy(&word, mask + (bit >> 3), 8);
    bits &= static_cast<uint32_t>(word >> (bit & 7));
  } else if (kPlace == Place::kEdge) {
    bits = static_cast<uint32_t>(mask_bits(core, bit, count));
  }
  const T* end = values_at<T>(core, core.starts[core.rows]);
  if (kPlace == Place::kEdge && kReadsAhead && end - value < kChunk) {
    T last[kChunk];
    std::memset(static_cast<void*>(last), 0, sizeof(last));
    std::copy(value, end, last);
    expand(bits, last, out);
  } else {
    expand(bits, value, out);
  }
  value += __builtin_popcount(bits);
}

// The columns [c, c + count) of kRows_ rows and N tokens of y += x M; `bit` is the first's element.
template <Place kPlace, int kRows_, int N, typename T>
TARGET_INLINE void multiply_chunk(const Core& core, const uint8_t* mask, int64_t columns,
                                  int64_t bit, int64_t count, const T* (&value)[kRows_],
                                  const float (&scale)[kRows_][N], int64_t stride, float* y) {
  Floats sums[N][kParts], chunk[kParts];
  UNROLL for (int t = 0; t < N; ++t)
    UNROLL for (int p = 0; p < kParts; ++p)
      std::memcpy(&sums[t][p], y + t * stride + p * kLanes, sizeof(Floats));
  UNROLL for (int i = 0; i < kRows_; ++i) {
    __builtin_prefetch(reinterpret_cast<const char*>(value[i]) + kPrefetch);
    take<kPlace>(core, mask, bit + i * columns, count, value[i], chunk);
    UNROLL for (int t = 0; t < N; ++t)
      UNROLL for (int p = 0; p < kParts; ++p) sums[t][p] += scale[i][t] * chunk[p];
  }
  UNROLL for (int t = 0; t < N; ++t)
    UNROLL for (int p = 0; p < kParts; ++p)
      std::memcpy(y + t * stride + p * kLanes, &sums[t][p], sizeof(Floats));
}

// kRows_ rows and N tokens of y += x M: one pass over y.
template <Place kPlace, int kRows_, int N, typename T>
TARGET void multiply_rows(const Core& core, int64_t row, int64_t stride, const float* x,
                          float* y) {
  const uint8_t* mask = core.mask;
  const int64_t columns = core.columns;
  const T* value[kRows_];
  float scale[kRows_][N];
  for (int i = 0; i < kRows_; ++i) {
    value[i] = values_at<T>(core, core.starts[row + i]);
    for (int t = 0; t < N; ++t) scale[i][t] = x[t * core.rows + row + i];
  }
  int64_t c = 0;
  for (; c + kChunk <= columns; c += kChunk)
    multiply_chunk<kPlace, kRows_, N>(core, mask, columns, row * columns + c, kChunk, value, scale,
                                      stride, y + c);
  if (c < columns)
    multiply_chunk<kPlace, kRows_, N>(core, mask, columns, row * columns + c, columns - c, value,
                                      scale, stride, y + c);
}

// One row and N tokens of y = x M^T.
template <Place kPlace, int N, typename T>
TARGET void multiply_row_transposed(const Core& core, int64_t row, int64_t stride,
                                    const float* x, float* y) {
  const uint8_t* mask = core.mask;
  const int64_t columns = core.columns;
  const T* value = values_at<T>(core, core.starts[row]);
  Floats sums[N][kParts] = {};
  for (int64_t c = 0; c < columns; c += kChunk) {
    Floats chunk[kParts], scale;
    __builtin_prefetch(reinterpret_cast<const char*>(value) + kPrefetch);
    take<kPlace>(core, mask, row * columns + c, std::min(kChunk, columns - c), value, chunk);
    UNROLL for (int t = 0; t < N; ++t)
      UNROLL for (int p = 0; p < kParts; ++p) {
        std::memcpy(&scale, x + t * stride + c + p * kLanes, sizeof(scale));
        sums[t][p] += chunk[p] * scale;
      }
  }
  UNROLL for (int t = 0; t < N; ++t) {
    float lanes[kLanes];
    for (int p = 1; p < kParts; ++p) sums[t][0] += sums[t][p];
    std::memcpy(lanes, &sums[t][0], sizeof(lanes));
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    y[t * core.rows + row] = lanes[0];
  }
}

// Blocks of N tokens, then of half as many. Few rows are at the end of the core or left over: they
// are taken one by one, and need no code for each number of them.
template <bool kTransposed, int N, typename T>
void multiply_tokens(const Core& core, int64_t first, int64_t last, int64_t tokens,
                     int64_t stride, const float* x, float* y) {
  for (; tokens >= N; tokens -= N) {
    for (int64_t r = first, step = 1; r < last; r += step) {
      if constexpr (kTransposed) {
        BY_PLACE(place_of(core, r + 1), multiply_row_transposed, N, T)(core, r, stride, x, y);
      } else {
        const Place place = r + kRows <= last ? place_of(core, r + kRows) : Place::kEdge;
        step = place == Place::kEdge ? 1 : kRows;
        if (place == Place::kEdge)
          multiply_rows<Place::kEdge, 1, N, T>(core, r, stride, x, y);
        else if (place == Place::kMasked)
          multiply_rows<Place::kMasked, kRows, N, T>(core, r, stride, x, y);
        else
          multiply_rows<Place::kDense, kRows, N, T>(core, r, stride, x, y);
      }
    }
    x += N * (kTransposed ? stride : core.rows);
    y += N * (kTransposed ? core.rows : stride);
  }
  if constexpr (N > 1)
    multiply_tokens<kTransposed, N / 2, T>(core, first, last, tokens, stride, x, y);
}

template <bool kTransposed, typename T>
void multiply(const Core& core, int64_t first, int64_t last, int64_t tokens, int64_t stride,
              const float* x, float* y) {
  multiply_tokens<kTransposed, kTokens, T>(core, first, last, tokens, stride, x, y);
}

template <Place kPlace, typename T, typename Out>
TARGET void expand_row_at(const Core& core, int64_t row, int64_t first, int64_t last,
                          const T* value, Out* dense) {
  const uint8_t* mask = core.mask;
  const int64_t bit = row * core.columns;
  int64_t c = first;
  for (; c + kChunk <= last; c += kChunk, dense += kChunk)
    take<kPlace>(core, mask, bit + c, kChunk, value, dense);
  if (c < last) {
    Out chunk[kChunk];
    take<kPlace>(core, mask, bit + c, last - c, value, chunk);
    std::copy_n(chunk, last - c, dense);
  }
}

template <typename T, typename Out>
void expand_row(const Core& core, int64_t row, int64_t first, int64_t last, const T* value,
                Out* dense) {
  BY_PLACE(place_of(core, row + 1), expand_row_at, T, Out)(core, row, first, last, value, dense);
}

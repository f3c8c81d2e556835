// The end of a path's file: its functions (bitmask.h), for values of every type. Defined before:
//
//   multiply<kTransposed, T>   as Path::multiply
//   expand_row<T, Out>         dense (last - first) = the columns [first, last) of a row, whose
//                              values start at `value`

constexpr int64_t kRowsAhead = 8;  // how early a row of a tile is asked for

template <typename T, typename Out>
void expand_tile(const Core& core, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                 const int64_t* from, Out* dense) {
  // What a row of the tile takes, on average. Hardware does not foresee the jump to the next row.
  const int64_t share = (core.starts[core.rows] * (c1 - c0)) / (core.rows * core.columns) + 1;
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t ahead = std::min(r + kRowsAhead, r1 - 1);
    if (core.mask != nullptr) __builtin_prefetch(core.mask + (ahead * core.columns + c0) / 8);
    for (int64_t i = 0; i < share; i += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(values_at<T>(core, from[ahead - r0] + i));
    expand_row(core, r, c0, c1, values_at<T>(core, from[r - r0]), dense + (r - r0) * (c1 - c0));
  }
}

template <typename Function>
void by_type(Type type, Function function) {
  switch (type) {
    case Type::kFloat: return function(float());
    case Type::kBFloat16: return function(c10::BFloat16());
    case Type::kHalf: return function(c10::Half());
  }
}

constexpr Path kPath{
    [](const Core& core, bool transposed, int64_t first, int64_t last, int64_t tokens,
       int64_t stride, const float* x, float* y) {
      by_type(core.type, [&](auto value) {
        using T = decltype(value);
        const auto product = transposed ? multiply<true, T> : multiply<false, T>;
        product(core, first, last, tokens, stride, x, y);
      });
    },
    [](const Core& core, int64_t r0, int64_t r1, int64_t c0, int64_t c1, const int64_t* from,
       bool wide, void* dense) {
      by_type(core.type, [&](auto value) {
        using T = decltype(value);
        if (wide)
          expand_tile<T>(core, r0, r1, c0, c1, from, static_cast<float*>(dense));
        else
          expand_tile<T>(core, r0, r1, c0, c1, from, static_cast<T*>(dense));
      });
    }};

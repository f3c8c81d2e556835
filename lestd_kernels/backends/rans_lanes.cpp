// Decodes the lanes of a stream of lestd_kernels/storage/rans.py, whose numpy is the specification.
//
// Streams are shared out among threads by the caller. Whatever a damaged one says, it is read within
// bounds only: a lane that wants more words than there are gets the last, and does not end as it
// should.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

namespace lestd {
namespace {

constexpr int64_t kLanes = 32;  // decoded together: their numbers fill one line of the cache
constexpr uint32_t kLow = 1u << 16;
constexpr int64_t kSums = 31;   // of two levels of 4 bits

// What a slot of a table says, in 8 bytes.
struct Slot {
  uint16_t frequency, offset;
  int16_t number;
  int16_t unused;
};
static_assert(sizeof(Slot) == sizeof(int64_t));

struct Stream {
  const Slot* tables;
  const uint16_t* words;
  const int64_t* ends;
  const uint32_t* states;
  const uint8_t *row_levels, *column_levels, *class_of_sum;
  int64_t rows, columns, lanes, words_count;
  int precision;
  bool several;
};

// Decodes `width` lanes from `first` on; returns whether all end where they should.
template <bool kSeveral>
bool decode_lanes(const Stream& s, int64_t first, int64_t width, int16_t* numbers) {
  uint32_t state[kLanes];
  int64_t at[kLanes];
  for (int64_t k = 0; k < width; ++k) {
    state[k] = s.states[first + k];
    at[k] = first + k ? s.ends[first + k - 1] : 0;
  }
  const uint32_t mask = (1u << s.precision) - 1;
  const int64_t elements = s.rows * s.columns, last = s.words_count - 1;
  for (int64_t start = first; start - first < elements; start += s.lanes) {
    // Those that fill up the last step are of the first table, and no elements.
    const int64_t there = std::clamp<int64_t>(elements - start, 0, width);
    int64_t row = 0, column = 0;
    if (kSeveral && there) row = start / s.columns, column = start % s.columns;
    for (int64_t k = 0; k < width; ++k) {
      uint32_t x = state[k];
      const Slot* table = s.tables;
      if (kSeveral && k < there) {
        const int own = s.class_of_sum[s.row_levels[row] + s.column_levels[column]];
        table += static_cast<int64_t>(own) << s.precision;
        if (++column == s.columns) column = 0, ++row;
      }
      const Slot slot = table[x & mask];
      x = slot.frequency * (x >> s.precision) + slot.offset;
      const uint32_t word = s.words[std::min(at[k], last)];
      const bool low = x < kLow;
      state[k] = low ? x << 16 | word : x;
      at[k] += low;
      if (k < there) numbers[start + k] = slot.number;
    }
  }
  bool ended = true;
  for (int64_t k = 0; k < width; ++k) {
    ended &= at[k] == s.ends[first + k] && state[k] == kLow;
  }
  return ended;
}

// tables int64 (classes << precision), ends int64 (lanes), states int32 (lanes), words int16 (at
// least one), levels (rows, columns) and classes uint8 -> numbers int16 (rows columns), and whether
// all lanes end where they should.
std::tuple<at::Tensor, bool> rans_lanes(const at::Tensor& tables, const at::Tensor& words,
                                        const at::Tensor& ends, const at::Tensor& states,
                                        const at::Tensor& row_levels,
                                        const at::Tensor& column_levels,
                                        const at::Tensor& class_of_sum, int64_t precision) {
  for (const at::Tensor& one :
       {tables, words, ends, states, row_levels, column_levels, class_of_sum}) {
    TORCH_CHECK(one.is_contiguous() && one.dim() == 1, "expected flat tensors");
  }
  const int64_t classes = tables.numel() >> precision, lanes = states.numel();
  TORCH_CHECK(precision > 0 && precision < 16 && tables.numel() == classes << precision,
              "expected whole tables");
  TORCH_CHECK(words.numel() > 0 && ends.numel() == lanes && class_of_sum.numel() == kSums,
              "expected words, ends of the lanes and classes");
  TORCH_CHECK(!row_levels.numel() || row_levels.max().item<int64_t>() * 2 < kSums, "row levels");
  TORCH_CHECK(!column_levels.numel() || column_levels.max().item<int64_t>() * 2 < kSums, "columns");
  TORCH_CHECK(class_of_sum.max().item<int64_t>() < classes, "expected a table for each class");
  TORCH_CHECK(!lanes || ends.min().item<int64_t>() >= 0, "expected ends within the words");
  const Stream s{reinterpret_cast<const Slot*>(tables.const_data_ptr<int64_t>()),
                 reinterpret_cast<const uint16_t*>(words.const_data_ptr<int16_t>()),
                 ends.const_data_ptr<int64_t>(),
                 reinterpret_cast<const uint32_t*>(states.const_data_ptr<int32_t>()),
                 row_levels.const_data_ptr<uint8_t>(),
                 column_levels.const_data_ptr<uint8_t>(),
                 class_of_sum.const_data_ptr<uint8_t>(),
                 row_levels.numel(),
                 column_levels.numel(),
                 lanes,
                 words.numel(),
                 static_cast<int>(precision),
                 classes > 1};
  at::Tensor numbers = at::empty({s.rows * s.columns}, at::kShort);
  int16_t* out = numbers.mutable_data_ptr<int16_t>();
  bool ended = true;
  for (int64_t first = 0; first < lanes; first += kLanes) {
    const int64_t width = std::min(kLanes, lanes - first);
    ended &= s.several ? decode_lanes<true>(s, first, width, out)
                       : decode_lanes<false>(s, first, width, out);
  }
  return {numbers, ended};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lestd, library) {
  library.def(
      "rans_lanes(Tensor tables, Tensor words, Tensor ends, Tensor states, Tensor row_levels, "
      "Tensor column_levels, Tensor class_of_sum, int precision) -> (Tensor, bool)");
}

TORCH_LIBRARY_IMPL(lestd, CPU, library) { library.impl("rans_lanes", rans_lanes); }

}  // namespace lestd

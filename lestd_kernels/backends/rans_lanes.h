// Decodes the lanes of a stream of lestd_kernels/storage/rans.py, whose numpy is the specification.
//
// Streams are shared out among threads by the caller. Whatever a damaged one says, it is read within
// bounds only: a lane that wants more words than there are gets the last, and does not end as it
// should. With AVX-512 a step decodes 16 lanes at once. A part of bitmask.cpp, as packing.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bitmask.h"

#ifdef HAVE_X86_PATHS
#include <immintrin.h>
#endif

namespace lestd {
namespace {

constexpr int64_t kLanes = 32;  // decoded together: their numbers fill one line of the cache
constexpr uint32_t kLow = 1u << 16;
constexpr int64_t kSums = 31;   // of two levels of 4 bits
constexpr int64_t kPadding = 2;  // words behind the last: two are read at once

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
  const int64_t elements = s.rows * s.columns, last = s.words_count - kPadding;
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

#ifdef HAVE_X86_PATHS
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))

constexpr int64_t kVector = 16, kGroup = 16 * kVector;  // lanes whose words stay in the first cache

// The classes of 16 elements from one on; 0 behind the last.
TARGET inline __m512i classes_from(const Stream& s, int64_t row, int64_t column, int64_t there) {
  alignas(16) uint8_t sums[kVector] = {};
  if (column + kVector <= s.columns && there == kVector) {
    const __m128i levels =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(s.column_levels + column));
    _mm_store_si128(reinterpret_cast<__m128i*>(sums),
                    _mm_add_epi8(levels, _mm_set1_epi8(static_cast<char>(s.row_levels[row]))));
  } else {
    for (int64_t k = 0; k < there; ++k) {
      sums[k] = s.row_levels[row] + s.column_levels[column];
      if (++column == s.columns) column = 0, ++row;
    }
  }
  // Of 31 sums: two halves of a table of bytes.
  const __m128i at = _mm_load_si128(reinterpret_cast<const __m128i*>(sums));
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s.class_of_sum));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s.class_of_sum + 15));
  const __m128i is_high = _mm_cmpgt_epi8(at, _mm_set1_epi8(15));
  const __m128i of_high = _mm_shuffle_epi8(high, _mm_sub_epi8(at, _mm_set1_epi8(15)));
  const __m128i own = _mm_blendv_epi8(_mm_shuffle_epi8(low, at), of_high, is_high);
  const __mmask16 some = static_cast<__mmask16>((1u << there) - 1);
  return _mm512_maskz_cvtepu8_epi32(some, own);
}

// Tables of 4 bytes a slot, which take half as long to look up, where frequencies are below 2^12:
// frequency less 1, offset, and the number's place above the least of its class.
struct Small {
  std::vector<uint32_t> slots;  // none where a table has too many numbers
  int32_t least[32] = {};
};

constexpr int32_t kEscape = -(1 << 15), kNowhere = 255;

Small small_tables(const Stream& s, int64_t classes) {
  Small found;
  if (s.precision > 12) return found;
  const int64_t size = int64_t{1} << s.precision;
  std::vector<uint32_t> slots(classes * size);
  for (int64_t i = 0; i < classes * size; ++i) {
    const Slot& slot = s.tables[i];
    int32_t& least = found.least[i / size];
    // The first that is no escape: numbers ascend.
    if (i % size == 0 && slot.number != kEscape) least = slot.number;
    const int32_t place = slot.number == kEscape ? kNowhere : slot.number - least;
    if (place < 0 || (place >= kNowhere && slot.number != kEscape) || slot.frequency == 0 ||
        slot.frequency > size || slot.offset >= size)
      return found;
    slots[i] = (slot.frequency - 1u) | uint32_t{slot.offset} << 12 | uint32_t(place) << 24;
  }
  found.slots = std::move(slots);
  return found;
}

// `decode_lanes` of up to kGroup lanes.
template <bool kSeveral>
TARGET bool decode_vectors(const Stream& s, const Small& small, int64_t first, int64_t width,
                           int16_t* numbers) {
  alignas(64) uint32_t state[kGroup];
  alignas(64) int32_t at[kGroup];
  std::fill_n(state, kGroup, kLow);
  std::fill_n(at, kGroup, 0);
  for (int64_t k = 0; k < width; ++k) {
    state[k] = s.states[first + k];
    at[k] = static_cast<int32_t>(first + k ? s.ends[first + k - 1] : 0);
  }
  const __m512i mask = _mm512_set1_epi32((1 << s.precision) - 1), low = _mm512_set1_epi32(kLow);
  const __m512i last = _mm512_set1_epi32(static_cast<int32_t>(s.words_count - kPadding));
  const __m512i half = _mm512_set1_epi32(0xFFFF), one = _mm512_set1_epi32(1);
  const __m512i field = _mm512_set1_epi32(0xFFF), escape = _mm512_set1_epi32(kEscape);
  const __m512i least[2] = {_mm512_loadu_si512(small.least), _mm512_loadu_si512(small.least + 16)};
  const __m512i nowhere = _mm512_set1_epi32(kNowhere);
  const __m128i precision = _mm_cvtsi32_si128(s.precision);
  const int64_t elements = s.rows * s.columns;
  for (int64_t start = first; start - first < elements; start += s.lanes) {
    int64_t row = 0, column = 0;
    if (kSeveral && start < elements) row = start / s.columns, column = start % s.columns;
    for (int64_t k = 0; k < width; k += kVector) {
      const int64_t lanes = std::min(kVector, width - k);
      const int64_t there = std::clamp<int64_t>(elements - start - k, 0, lanes);
      __m512i x = _mm512_load_si512(state + k), index = _mm512_and_si512(x, mask);
      __m512i base = _mm512_broadcastd_epi32(_mm512_castsi512_si128(least[0]));
      if (kSeveral) {
        const __m512i own = classes_from(s, row, column, there);
        base = _mm512_permutex2var_epi32(least[0], own, least[1]);
        index = _mm512_add_epi32(index, _mm512_sll_epi32(own, precision));
        column += there;
        while (column >= s.columns) column -= s.columns, ++row;
      }
      __m512i frequency, offset, number;
      if (!small.slots.empty()) {
        const __m512i slot = _mm512_i32gather_epi32(index, small.slots.data(), 4);
        frequency = _mm512_add_epi32(_mm512_and_si512(slot, field), one);
        offset = _mm512_and_si512(_mm512_srli_epi32(slot, 12), field);
        const __m512i place = _mm512_srli_epi32(slot, 24);
        number = _mm512_mask_mov_epi32(_mm512_add_epi32(base, place),
                                       _mm512_cmpeq_epi32_mask(place, nowhere), escape);
      } else {
        const __m512i slot = _mm512_i32gather_epi32(index, s.tables, sizeof(Slot));
        number = _mm512_i32gather_epi32(index, reinterpret_cast<const char*>(s.tables) + 4,
                                        sizeof(Slot));
        frequency = _mm512_and_si512(slot, half), offset = _mm512_srli_epi32(slot, 16);
      }
      x = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srl_epi32(x, precision)), offset);
      const __mmask16 own = static_cast<__mmask16>((1u << lanes) - 1);
      const __mmask16 wants = _mm512_mask_cmplt_epu32_mask(own, x, low);
      __m512i place = _mm512_load_si512(at + k);
      const __m512i word = _mm512_and_si512(
          half, _mm512_mask_i32gather_epi32(low, wants, _mm512_min_epi32(place, last), s.words, 2));
      x = _mm512_mask_or_epi32(x, wants, _mm512_slli_epi32(x, 16), word);
      _mm512_store_si512(state + k, x);
      _mm512_store_si512(at + k, _mm512_mask_add_epi32(place, wants, place, one));
      _mm512_mask_cvtepi32_storeu_epi16(numbers + start + k,
                                        static_cast<__mmask16>((1u << there) - 1), number);
    }
  }
  bool ended = true;
  for (int64_t k = 0; k < width; ++k) ended &= at[k] == s.ends[first + k] && state[k] == kLow;
  return ended;
}
#endif

// tables int64 (classes << precision), ends int64 (lanes), states int32 (lanes), words int16 with
// kPadding more, levels (rows, columns) and classes uint8, a path of bitmask.h -> numbers int16
// (rows columns), and whether all lanes end where they should.
std::tuple<at::Tensor, bool> rans_lanes(const at::Tensor& tables, const at::Tensor& words,
                                        const at::Tensor& ends, const at::Tensor& states,
                                        const at::Tensor& row_levels,
                                        const at::Tensor& column_levels,
                                        const at::Tensor& class_of_sum, int64_t precision,
                                        const std::string& path) {
  for (const at::Tensor& one :
       {tables, words, ends, states, row_levels, column_levels, class_of_sum}) {
    TORCH_CHECK(one.is_contiguous() && one.dim() == 1, "expected flat tensors");
  }
  const int64_t classes = tables.numel() >> precision, lanes = states.numel();
  TORCH_CHECK(precision > 0 && precision < 16 && tables.numel() == classes << precision,
              "expected whole tables");
  TORCH_CHECK(words.numel() >= kPadding && words.numel() <= INT32_MAX && ends.numel() == lanes && class_of_sum.numel() == kSums,
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
#ifdef HAVE_X86_PATHS
  if (path == "avx512") {
    const Small small = small_tables(s, classes);
    for (int64_t first = 0; first < lanes; first += kGroup) {
      const int64_t width = std::min(kGroup, lanes - first);
      ended &= s.several ? decode_vectors<true>(s, small, first, width, out)
                         : decode_vectors<false>(s, small, first, width, out);
    }
    return {numbers, ended};
  }
#endif
  for (int64_t first = 0; first < lanes; first += kLanes) {
    const int64_t width = std::min(kLanes, lanes - first);
    ended &= s.several ? decode_lanes<true>(s, first, width, out)
                       : decode_lanes<false>(s, first, width, out);
  }
  return {numbers, ended};
}

}  // namespace
}  // namespace lestd

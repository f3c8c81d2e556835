// The path for CPUs with AVX2.
#include "bitmask.h"

#ifdef HAVE_X86_PATHS
#include <immintrin.h>

#include "bitmask_shuffles.h"

namespace lestd {
namespace {

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi2")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

constexpr int kLanes = 8, kParts = kChunk / kLanes, kTokens = 2;
constexpr bool kReadsAhead = true;
typedef float Floats __attribute__((vector_size(32)));

TARGET_INLINE __m128i load(const void* values) {
  return _mm_loadu_si128(static_cast<const __m128i*>(values));
}

template <typename Table>
TARGET_INLINE Floats shuffle(__m256i values, const Table& table, uint32_t bits) {
  const void* bytes = table.bytes[bits & 255];
  return (Floats)_mm256_shuffle_epi8(values, _mm256_load_si256(static_cast<const __m256i*>(bytes)));
}

TARGET_INLINE void expand(uint32_t bits, const float* value, Floats* out) {
  UNROLL for (int p = 0; p < kParts; ++p) {
    const __m256i low = _mm256_castsi128_si256(load(value + values_below(bits, 8 * p)));
    const __m128i high = load(value + values_below(bits, 8 * p + 4));
    out[p] = shuffle(_mm256_inserti128_si256(low, high, 1), kShuffles32, bits >> 8 * p);
  }
}

TARGET_INLINE void expand(uint32_t bits, const c10::BFloat16* value, Floats* out) {
  UNROLL for (int p = 0; p < kParts; ++p) {
    const __m256i both = _mm256_broadcastsi128_si256(load(value + values_below(bits, 8 * p)));
    out[p] = shuffle(both, kShufflesBFloat16, bits >> 8 * p);
  }
}

template <typename T>
TARGET_INLINE __m128i expand_eight(uint32_t bits, const T* value, int p) {
  return _mm_shuffle_epi8(load(value + values_below(bits, 8 * p)),
                          load(kShuffles16.bytes[bits >> 8 * p & 255]));
}

TARGET_INLINE void expand(uint32_t bits, const c10::Half* value, Floats* out) {
  UNROLL for (int p = 0; p < kParts; ++p) out[p] = _mm256_cvtph_ps(expand_eight(bits, value, p));
}

template <typename T>
TARGET_INLINE void expand_16(uint32_t bits, const T* value, T* out) {
  UNROLL for (int p = 0; p < kParts; ++p)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * p), expand_eight(bits, value, p));
}

#include "bitmask_loops.h"

#include "bitmask_path.h"

}  // namespace

const Path kAvx2 = kPath;

}  // namespace lestd
#endif

// The path for CPUs with AVX-512 and VBMI2, which expand values themselves.
#include "bitmask.h"

#ifdef HAVE_X86_PATHS
#include <immintrin.h>

namespace lestd {
namespace {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi2")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

constexpr int kLanes = 16, kParts = kChunk / kLanes, kTokens = 8;
constexpr bool kReadsAhead = false;
typedef float Floats __attribute__((vector_size(64)));

TARGET_INLINE void expand(uint32_t bits, const float* value, Floats* out) {
  out[0] = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits), value);
  value += values_below(bits, 16);
  out[1] = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits >> 16), value);
}

TARGET_INLINE __m512 widen(__m256i half, const c10::BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TARGET_INLINE __m512 widen(__m256i half, const c10::Half*) { return _mm512_cvtph_ps(half); }

template <typename T>
TARGET_INLINE void expand(uint32_t bits, const T* value, Floats* out) {
  const __m512i chunk = _mm512_maskz_expandloadu_epi16(bits, value);
  out[0] = widen(_mm512_castsi512_si256(chunk), value);
  out[1] = widen(_mm512_extracti64x4_epi64(chunk, 1), value);
}

template <typename T>
TARGET_INLINE void expand_16(uint32_t bits, const T* value, T* out) {
  _mm512_storeu_si512(out, _mm512_maskz_expandloadu_epi16(bits, value));
}

#include "bitmask_loops.h"

#include "bitmask_path.h"

}  // namespace

const Path kAvx512 = kPath;

}  // namespace lestd
#endif

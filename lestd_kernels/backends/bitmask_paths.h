// Paths of the kernel beside the portable one, each for CPUs with certain vector instructions: how 32
// values are expanded. The loops around that are written once (bitmask_loops.h).
#pragma once

#include "bitmask.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_X86_PATHS 1
#elif defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#define HAVE_NEON_PATH 1
#endif

namespace {

// For each 8 bits of a mask: which bytes of the values to take to the lanes of its set bits, from the
// 16 bytes where the values of 8 lanes (in 16 bits) or of 4 (in 32) start. A byte with the high bit
// makes a zero, on x86 and on ARM. In wider lanes values stand at the upper end: a bfloat16 becomes
// a float.
template <int kValueBytes, int kLaneBytes>
struct Shuffles {
  alignas(32) uint8_t bytes[256][8 * kLaneBytes] = {};

  constexpr Shuffles() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, next = 0; lane < 8; ++lane) {
        if (lane % (16 / kValueBytes) == 0) next = 0;
        const bool set = mask >> lane & 1;
        for (int b = 0, from = b + kValueBytes - kLaneBytes; b < kLaneBytes; ++b, ++from)
          bytes[mask][lane * kLaneBytes + b] = set && from >= 0 ? next * kValueBytes + from : 0x80;
        next += set;
      }
  }
};

constexpr Shuffles<2, 2> kShuffles16;
constexpr Shuffles<2, 4> kShufflesBFloat16;
constexpr Shuffles<4, 4> kShuffles32;

// Values below element `lane` of those that `bits` tells of.
inline __attribute__((always_inline)) int values_below(uint32_t bits, int lane) {
  return __builtin_popcount(bits & ((1u << lane) - 1));
}

#define UNROLL _Pragma("GCC unroll 8")

#ifdef HAVE_X86_PATHS
namespace avx512 {

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

}  // namespace avx512

namespace avx2 {

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

}  // namespace avx2
#endif  // HAVE_X86_PATHS

#ifdef HAVE_NEON_PATH
namespace neon {

#define TARGET
#define TARGET_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 4, kParts = kChunk / kLanes, kTokens = 2;
constexpr bool kReadsAhead = true;
typedef float32x4_t Floats;

TARGET_INLINE uint8x16_t load(const void* values) {
  return vld1q_u8(static_cast<const uint8_t*>(values));
}

TARGET_INLINE void expand(uint32_t bits, const float* value, Floats* out) {
  UNROLL for (int p = 0; p < kParts; ++p) {
    const uint8_t* bytes = kShuffles32.bytes[bits >> 4 * (p & ~1) & 255] + 16 * (p & 1);
    out[p] = vreinterpretq_f32_u8(vqtbl1q_u8(load(value + values_below(bits, 4 * p)), load(bytes)));
  }
}

TARGET_INLINE void expand(uint32_t bits, const c10::BFloat16* value, Floats* out) {
  UNROLL for (int p = 0; p < kParts; ++p) {
    const uint8_t* bytes = kShufflesBFloat16.bytes[bits >> 4 * (p & ~1) & 255] + 16 * (p & 1);
    const uint8x16_t values = load(value + values_below(bits, 4 * (p & ~1)));
    out[p] = vreinterpretq_f32_u8(vqtbl1q_u8(values, load(bytes)));
  }
}

template <typename T>
TARGET_INLINE uint8x16_t expand_eight(uint32_t bits, const T* value, int p) {
  return vqtbl1q_u8(load(value + values_below(bits, 8 * p)),
                    load(kShuffles16.bytes[bits >> 8 * p & 255]));
}

TARGET_INLINE void expand(uint32_t bits, const c10::Half* value, Floats* out) {
  UNROLL for (int p = 0; p < kParts; p += 2) {
    const float16x8_t eight = vreinterpretq_f16_u8(expand_eight(bits, value, p / 2));
    out[p] = vcvt_f32_f16(vget_low_f16(eight));
    out[p + 1] = vcvt_f32_f16(vget_high_f16(eight));
  }
}

template <typename T>
TARGET_INLINE void expand_16(uint32_t bits, const T* value, T* out) {
  UNROLL for (int p = 0; p < kChunk / 8; ++p)
    vst1q_u8(reinterpret_cast<uint8_t*>(out + 8 * p), expand_eight(bits, value, p));
}

#include "bitmask_loops.h"

}  // namespace neon
#endif  // HAVE_NEON_PATH

#undef UNROLL

}  // namespace

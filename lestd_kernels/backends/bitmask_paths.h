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

// What moves 16 bytes of values of kBytes to the lanes where the bits of a mask are set: for each
// mask, the bytes to take; one with the high bit makes a zero, on x86 and on ARM.
template <int kBytes>
struct Shuffles {
  static constexpr int kLanes = 16 / kBytes;
  alignas(16) uint8_t bytes[1 << kLanes][16] = {};

  constexpr Shuffles() {
    for (int mask = 0; mask < 1 << kLanes; ++mask)
      for (int lane = 0, next = 0; lane < kLanes; ++lane) {
        const bool set = mask >> lane & 1;
        for (int b = 0; b < kBytes; ++b)
          bytes[mask][lane * kBytes + b] = set ? next * kBytes + b : 0x80;
        next += set;
      }
  }
};

constexpr Shuffles<2> kShuffles16;
constexpr Shuffles<4> kShuffles32;

// Values below element `lane` of those that `bits` tells of.
inline __attribute__((always_inline)) int values_below(uint32_t bits, int lane) {
  return __builtin_popcount(bits & ((1u << lane) - 1));
}

}  // namespace

#ifdef HAVE_X86_PATHS
namespace {
namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi2")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

constexpr int kLanes = 16, kParts = kChunk / kLanes, kTokens = 8;
constexpr bool kReadsAhead = false;
typedef __m512 Floats;

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
typedef __m256 Floats;

TARGET_INLINE __m128i shuffle(const void* values, const uint8_t* bytes) {
  return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)),
                          _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

TARGET_INLINE void expand(uint32_t bits, const float* value, Floats* out) {
  for (int p = 0; p < kParts; ++p) {
    const uint32_t low = bits >> 8 * p & 15, high = bits >> (8 * p + 4) & 15;
    const __m256i values = _mm256_loadu2_m128i(
        reinterpret_cast<const __m128i*>(value + values_below(bits, 8 * p + 4)),
        reinterpret_cast<const __m128i*>(value + values_below(bits, 8 * p)));
    const __m256i bytes = _mm256_loadu2_m128i(
        reinterpret_cast<const __m128i*>(kShuffles32.bytes[high]),
        reinterpret_cast<const __m128i*>(kShuffles32.bytes[low]));
    out[p] = _mm256_castsi256_ps(_mm256_shuffle_epi8(values, bytes));
  }
}

TARGET_INLINE __m256 widen(__m128i half, const c10::BFloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

TARGET_INLINE __m256 widen(__m128i half, const c10::Half*) { return _mm256_cvtph_ps(half); }

template <typename T>
TARGET_INLINE __m128i eight(uint32_t bits, const T* value, int p) {
  return shuffle(value + values_below(bits, 8 * p), kShuffles16.bytes[bits >> 8 * p & 255]);
}

template <typename T>
TARGET_INLINE void expand(uint32_t bits, const T* value, Floats* out) {
  for (int p = 0; p < kParts; ++p) out[p] = widen(eight(bits, value, p), value);
}

template <typename T>
TARGET_INLINE void expand_16(uint32_t bits, const T* value, T* out) {
  for (int p = 0; p < kParts; ++p)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * p), eight(bits, value, p));
}

#include "bitmask_loops.h"

}  // namespace avx2
}  // namespace
#endif  // HAVE_X86_PATHS

#ifdef HAVE_NEON_PATH
namespace {
namespace neon {

#define TARGET
#define TARGET_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 4, kParts = kChunk / kLanes, kTokens = 2;
constexpr bool kReadsAhead = true;
typedef float32x4_t Floats;

TARGET_INLINE uint8x16_t shuffle(const void* values, const uint8_t* bytes) {
  return vqtbl1q_u8(vld1q_u8(static_cast<const uint8_t*>(values)), vld1q_u8(bytes));
}

TARGET_INLINE void expand(uint32_t bits, const float* value, Floats* out) {
  for (int p = 0; p < kParts; ++p)
    out[p] = vreinterpretq_f32_u8(
        shuffle(value + values_below(bits, 4 * p), kShuffles32.bytes[bits >> 4 * p & 15]));
}

TARGET_INLINE float32x4_t widen(uint16x4_t half, const c10::BFloat16*) {
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

TARGET_INLINE float32x4_t widen(uint16x4_t half, const c10::Half*) {
  return vcvt_f32_f16(vreinterpret_f16_u16(half));
}

template <typename T>
TARGET_INLINE uint16x8_t eight(uint32_t bits, const T* value, int p) {
  return vreinterpretq_u16_u8(
      shuffle(value + values_below(bits, 8 * p), kShuffles16.bytes[bits >> 8 * p & 255]));
}

template <typename T>
TARGET_INLINE void expand(uint32_t bits, const T* value, Floats* out) {
  for (int p = 0; p < kParts / 2; ++p) {
    const uint16x8_t values = eight(bits, value, p);
    out[2 * p] = widen(vget_low_u16(values), value);
    out[2 * p + 1] = widen(vget_high_u16(values), value);
  }
}

template <typename T>
TARGET_INLINE void expand_16(uint32_t bits, const T* value, T* out) {
  for (int p = 0; p < kChunk / 8; ++p)
    vst1q_u16(reinterpret_cast<uint16_t*>(out + 8 * p), eight(bits, value, p));
}

#include "bitmask_loops.h"

}  // namespace neon
}  // namespace
#endif  // HAVE_NEON_PATH

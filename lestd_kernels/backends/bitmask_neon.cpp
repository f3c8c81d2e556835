// The path for CPUs of ARM.
#include "bitmask.h"

#ifdef HAVE_NEON_PATH
#include <arm_neon.h>

#include "bitmask_shuffles.h"

namespace lestd {
namespace {

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

#include "bitmask_path.h"

}  // namespace

const Path kNeon = kPath;

}  // namespace lestd
#endif

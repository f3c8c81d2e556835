// How paths whose CPU can only shuffle bytes bring values to their lanes.
#pragma once

#include "bitmask.h"

namespace lestd {

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

}  // namespace lestd

// Packs whole numbers in few bits as lestd_kernels/storage/packed_integers.py does, which is the
// specification. A part of bitmask.cpp: PyTorch's headers take longer to compile than all of this.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace lestd {
namespace {

constexpr int64_t kEight = 8, kBlock = 4096;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define WIDEST __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define WIDEST
#endif

// How many of a block's numbers are not zero, and are not among those of each number of bits.
WIDEST void count_block(const int16_t* z, int64_t size, const int32_t* bits, int64_t forms,
                        int64_t* nonzero, int64_t* outside) {
  uint16_t some = 0;
  for (int64_t i = 0; i < size; ++i) some += z[i] != 0;
  *nonzero += some;
  for (int64_t form = 0; form < forms; ++form) {
    const int16_t most = static_cast<int16_t>((1 << (bits[form] - 1)) - 1);
    uint16_t beyond = 0;
    for (int64_t i = 0; i < size; ++i) beyond += static_cast<int16_t>(z[i] ^ (z[i] >> 15)) > most;
    outside[form] += beyond;
  }
}

// What the numbers of a block are stored as, and how many do not fit in these bits; those outside are stored as zeros are.
WIDEST int64_t codes_of_block(const int16_t* z, int64_t size, int64_t bits, uint8_t* codes) {
  const int16_t half = static_cast<int16_t>(1 << (bits - 1));
  uint16_t beyond = 0;
  for (int64_t i = 0; i < size; ++i) {
    const bool out = static_cast<int16_t>(z[i] ^ (z[i] >> 15)) >= half;
    codes[i] = static_cast<uint8_t>((out ? 0 : z[i]) + half);
    beyond += out;
  }
  return beyond;
}

// The low bits of 8 bytes after 8 bytes beside each other, the first lowest. Writes up to 8 bytes
// more than they take.
template <int kBits>
void squeeze(const uint8_t* codes, int64_t size, uint8_t* packed) {
  constexpr int kGap = 8 - kBits;
  constexpr uint64_t kTwo = (1ull << 2 * kBits) - 1, kFour = (1ull << 4 * kBits) - 1;
  for (int64_t i = 0; i < size; i += kEight, packed += kBits) {
    uint64_t x;
    std::memcpy(&x, codes + i, kEight);
    x = (x | x >> kGap) & (kTwo * 0x0001000100010001ull);
    x = (x | x >> 2 * kGap) & (kFour * 0x0000000100000001ull);
    x |= x >> 4 * kGap;
    std::memcpy(packed, &x, kEight);
  }
}

using Squeeze = void (*)(const uint8_t*, int64_t, uint8_t*);

Squeeze squeeze_of(int64_t bits) {
  switch (bits) {
    case 2: return squeeze<2>;
    case 3: return squeeze<3>;
    case 4: return squeeze<4>;
    case 8: return squeeze<8>;
    default: TORCH_CHECK(false, "expected 2, 3, 4 or 8 bits");
  }
}

const int16_t* numbers_of(const at::Tensor& Z) {
  TORCH_CHECK(Z.is_contiguous() && Z.scalar_type() == at::kShort, "expected flat int16");
  return Z.const_data_ptr<int16_t>();
}

// Z int16, bits of each form -> how many are not zero, and then how many each form does not hold.
std::vector<int64_t> packing_counts(const at::Tensor& Z, at::IntArrayRef bits) {
  const int16_t* z = numbers_of(Z);
  std::vector<int32_t> forms(bits.begin(), bits.end());
  std::vector<int64_t> found(1 + forms.size());
  for (int64_t first = 0; first < Z.numel(); first += kBlock) {
    count_block(z + first, std::min(kBlock, Z.numel() - first), forms.data(),
                static_cast<int64_t>(forms.size()), &found[0], &found[1]);
  }
  return found;
}

// Z int16 -> codes uint8 (those of the mask alone, where there is one), mask uint8, count of the
// codes, and int64 where numbers are that these bits do not hold.
std::tuple<at::Tensor, at::Tensor, int64_t, at::Tensor> packing_pack(const at::Tensor& Z,
                                                                     int64_t bits, bool masked) {
  const int16_t* z = numbers_of(Z);
  const Squeeze squeeze = squeeze_of(bits);
  const int64_t size = Z.numel();
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  // A few more, since 8 bytes are written at once.
  at::Tensor packed = at::empty({(size * bits + 7) / 8 + kEight}, bytes);
  at::Tensor mask = at::empty({masked ? (size + 7) / 8 + kEight : 0}, bytes);
  uint8_t* out = packed.mutable_data_ptr<uint8_t>();
  uint8_t* marks = mask.mutable_data_ptr<uint8_t>();
  const uint8_t zero = static_cast<uint8_t>(1 << (bits - 1));
  std::vector<uint8_t> codes(kBlock + kEight), kept(kBlock + 2 * kEight);
  std::vector<int64_t> outside;
  int64_t count = masked ? 0 : size, held = 0;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t here = std::min(kBlock, size - first);
    std::memset(codes.data() + here, 0, kEight);
    if (codes_of_block(z + first, here, bits, codes.data()) != 0) {
      for (int64_t i = 0; i < here; ++i) {
        if (static_cast<int16_t>(z[first + i] ^ (z[first + i] >> 15)) >= zero)
          outside.push_back(first + i);
      }
    }
    if (!masked) {
      squeeze(codes.data(), here, out + first * bits / 8);
      continue;
    }
    const int64_t before = held;
    for (int64_t i = 0; i < here; i += kEight) {
      uint8_t mark = 0;
      for (int64_t k = 0; k < std::min(kEight, here - i); ++k) {
        const bool there = codes[i + k] != zero;
        mark |= there << k;
        kept[held] = codes[i + k];
        held += there;
      }
      marks[(first + i) / 8] = mark;
    }
    count += held - before;
    // Whole groups of 8 are written; the others wait for the next block.
    const int64_t whole = held / kEight * kEight;
    squeeze(kept.data(), whole, out);
    out += whole / 8 * bits;
    std::memmove(kept.data(), kept.data() + whole, held - whole);
    held -= whole;
  }
  if (masked) {
    std::memset(kept.data() + held, 0, kEight);
    if (held) squeeze(kept.data(), held, out);
  }
  const at::Tensor at = at::empty({static_cast<int64_t>(outside.size())}, at::kLong);
  if (!outside.empty())
    std::memcpy(at.mutable_data_ptr<int64_t>(), outside.data(), outside.size() * sizeof(int64_t));
  return {packed.narrow(0, 0, (count * bits + 7) / 8).clone(),
          mask.narrow(0, 0, masked ? (size + 7) / 8 : 0).clone(), count, at};
}

}  // namespace
}  // namespace lestd

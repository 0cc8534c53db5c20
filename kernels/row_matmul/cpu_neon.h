// Arm: NEON, which all 64-bit processors have. Products of 16-bit numbers, even and odd columns apart.

#pragma once

#include <arm_neon.h>

#include <cstring>

#include "cpu_types.h"

#define DBF_TARGET

namespace dbf_rows {
namespace neon {

constexpr int kParts = kRows / 4;

struct Lanes {
  int32x4_t part[kParts];
};
struct Floats {
  float32x4_t part[kParts];
};
struct Codes {
  int16x8_t even[kParts], odd[kParts];  // columns 0 and 2 of each row, columns 1 and 3
};
constexpr int64_t kDigitBytes = 2 * kStep;

template <typename To, typename Function>
inline To each(Function function) {
  To to;
  for (int i = 0; i < kParts; ++i) to.part[i] = function(i);
  return to;
}
inline Lanes load(const uint32_t* words) {
  return each<Lanes>([&](int i) { return vreinterpretq_s32_u32(vld1q_u32(words + 4 * i)); });
}
inline Lanes same(int32_t value) {
  return each<Lanes>([&](int) { return vdupq_n_s32(value); });
}
inline Lanes both(Lanes a, Lanes b) {
  return each<Lanes>([&](int i) { return vandq_s32(a.part[i], b.part[i]); });
}
inline Lanes either(Lanes a, Lanes b) {
  return each<Lanes>([&](int i) { return vorrq_s32(a.part[i], b.part[i]); });
}
template <int bits>
inline Lanes down(Lanes a) {
  return each<Lanes>([&](int i) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.part[i]), bits)); });
}
template <int bits>
inline Lanes up(Lanes a) {
  return each<Lanes>([&](int i) { return vshlq_n_s32(a.part[i], bits); });
}
template <int bits>
inline Codes codes_of(Lanes bytes) {
  const Lanes low = both(bytes, same(0x00FF00FF)), high = both(down<8>(bytes), same(0x00FF00FF));
  Codes codes;
  for (int i = 0; i < kParts; ++i) {
    codes.even[i] = vreinterpretq_s16_s32(low.part[i]);
    codes.odd[i] = vreinterpretq_s16_s32(high.part[i]);
  }
  return codes;
}
inline Lanes add_products(Lanes sum, const Codes& codes, const int8_t* x) {
  int32_t words[2];
  std::memcpy(words, x, sizeof words);
  const int16x4_t even = vreinterpret_s16_s32(vdup_n_s32(words[0])), odd = vreinterpret_s16_s32(vdup_n_s32(words[1]));
  return each<Lanes>([&](int i) {
    const int16x8_t a = codes.even[i], b = codes.odd[i];
    const int32x4_t low = vmlal_s16(vmull_s16(vget_low_s16(a), even), vget_low_s16(b), odd);
    const int32x4_t high = vmlal_s16(vmull_s16(vget_high_s16(a), even), vget_high_s16(b), odd);
    return vaddq_s32(sum.part[i], vpaddq_s32(low, high));
  });
}
inline Floats to_float(Lanes a) {
  return each<Floats>([&](int i) { return vcvtq_f32_s32(a.part[i]); });
}
inline Floats as_float(Lanes bits) {
  return each<Floats>([&](int i) { return vreinterpretq_f32_s32(bits.part[i]); });
}
inline Floats times(Floats a, Floats b) {
  return each<Floats>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
inline Floats times(Floats a, float b) {
  return each<Floats>([&](int i) { return vmulq_n_f32(a.part[i], b); });
}
inline Floats plus(Floats a, Floats b) {
  return each<Floats>([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
inline void store(float* to, Floats a) {
  for (int i = 0; i < kParts; ++i) vst1q_f32(to + 4 * i, a.part[i]);
}
inline void prefetch(const uint32_t* words) { __builtin_prefetch(words); }

inline void pack(const int8_t (*digits)[kStep], int8_t* to) {
  for (int64_t d = 0; d < kDigits; ++d) {
    const int16_t wide[kStep] = {digits[d][0], digits[d][2], digits[d][1], digits[d][3]};
    std::memcpy(to + d * kDigitBytes, wide, sizeof wide);
  }
}

#include "cpu_block.h"

}  // namespace neon

inline const Kernel& neon_kernel() {
  static const Kernel kernel{"neon", kDigits * neon::kDigitBytes, neon::pack, neon::multiply};
  return kernel;
}

}  // namespace dbf_rows

#undef DBF_TARGET

// 64-bit Arm: NEON, 16 rows in a register.

#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_portable.h"
#include "cpu_types.h"

namespace dbf {

namespace neon {

#define DBF_TARGET
using Bytes = uint8x16_t;
constexpr int kBytes = 16;

inline Bytes zero() { return vdupq_n_u8(0); }
inline Bytes low_nibbles(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
inline Bytes high_nibbles(Bytes v) { return vshrq_n_u8(v, 4); }
inline Bytes look_up(const uint8_t* table, Bytes index) { return vqtbl1q_u8(vld1q_u8(table), index); }
inline Bytes add8(Bytes a, Bytes b) { return vaddq_u8(a, b); }
inline Bytes add16(Bytes a, Bytes b) {
  return vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
inline Bytes high_bytes(Bytes v) { return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(v), 8)); }
inline void store(void* to, Bytes v) { vst1q_u8(static_cast<uint8_t*>(to), v); }

inline void load_columns(const Tile& tile, int64_t pass, int64_t w, Bytes* c) {
  const uint32_t* from = tile.words[pass] + w * kRows;
  __builtin_prefetch(reinterpret_cast<const char*>(from) + tile.prefetch_bytes, 0, 2);
  const uint8x16x4_t columns = vld4q_u8(reinterpret_cast<const uint8_t*>(from));
  for (int j = 0; j < 4; ++j) c[j] = columns.val[j];
}
inline int64_t row_of(int64_t pass, int64_t position) { return pass * kRows + position; }

#include "cpu_bytes.h"
#undef DBF_TARGET

inline Peaks peaks(const float* values, int64_t groups) {
  uint32x4_t value = vdupq_n_u32(0);  // as integers, absolute values keep their order, and NaN is the largest
  float32x4_t group = vdupq_n_f32(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    const float32x4_t v = vabsq_f32(vld1q_f32(values + g * kGroup));
    value = vmaxq_u32(value, vreinterpretq_u32_f32(v));
    const float32x4_t pairs = vaddq_f32(v, vrev64q_f32(v));
    group = vmaxq_f32(group, vaddq_f32(pairs, vextq_f32(pairs, pairs, 2)));
  }
  const uint32_t largest = vmaxvq_u32(value);
  Peaks peaks{0.0f, vmaxvq_f32(group)};
  std::memcpy(&peaks.value, &largest, 4);
  return peaks;
}

inline void build(const float* values, int64_t begin, int64_t end, int64_t, int bits, uint8_t* tables) {
  const int planes = planes_of(bits);
  for (int64_t g = begin * kGroupsPerWord; g < end * kGroupsPerWord; ++g, values += kGroup) {
    const float* v = values;
    // Four neighbouring entries share the signs of v2 and v3.
    const float pairs[4] = {-v[0] - v[1], v[0] - v[1], v[1] - v[0], v[0] + v[1]};
    const float32x4_t low = vld1q_f32(pairs);
    const float high[4] = {-v[2] - v[3], v[2] - v[3], v[3] - v[2], v[2] + v[3]};
    uint32_t entries[kEntries];
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int32x4_t sum = vcvtnq_s32_f32(vaddq_f32(low, vdupq_n_f32(high[quarter])));
      const uint32x4_t e = vreinterpretq_u32_s32(vaddq_s32(sum, vdupq_n_s32(1 << (bits - 1))));
      const uint32x4_t p01 = vorrq_u32(vandq_u32(e, vdupq_n_u32(0x3F)),
                                       vandq_u32(vshlq_n_u32(e, 2), vdupq_n_u32(0x3F00)));
      const uint32x4_t p23 = vorrq_u32(vandq_u32(vshlq_n_u32(e, 4), vdupq_n_u32(0x3F0000)),
                                       vandq_u32(vshlq_n_u32(e, 6), vdupq_n_u32(0x3F000000)));
      vst1q_u32(entries + 4 * quarter, vorrq_u32(p01, p23));
    }
    const uint8x16x4_t plane = vld4q_u8(reinterpret_cast<const uint8_t*>(entries));
    for (int p = 0; p < planes; ++p) vst1q_u8(tables + ((g / 4 * planes + p) * 4 + g % 4) * kEntries, plane.val[p]);
  }
}

inline void half_to_float(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
  portable_half_to_float(from + i, count - i, to + i);
}

inline void float_to_half(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
  portable_float_to_half(from + i, count - i, to + i);
}

}  // namespace neon

constexpr Kernel kNeon{"neon", 0, 8, neon::table_bytes, neon::peaks, neon::build,
                       neon::multiply, neon::half_to_float, neon::float_to_half};

}  // namespace dbf

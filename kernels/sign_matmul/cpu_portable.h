// Plain C++ for any processor: tables of int32, one look-up at a time. Read this one first.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu_types.h"

namespace dbf {

inline int64_t portable_table_bytes(int64_t words, int) { return words * kGroupsPerWord * kEntries * 4; }

inline Peaks portable_peaks(const float* values, int64_t groups) {
  Peaks peaks{0.0f, 0.0f};
  for (const float* v = values; v < values + groups * kGroup; v += kGroup) {
    for (int j = 0; j < kGroup; ++j)
      if (std::fabs(v[j]) > peaks.value || std::isnan(v[j])) peaks.value = std::fabs(v[j]);  // nothing is above NaN
    peaks.group = std::max(peaks.group, (std::fabs(v[0]) + std::fabs(v[1])) + (std::fabs(v[2]) + std::fabs(v[3])));
  }
  return peaks;
}

// Entry e is +-v0 +- v1 +- v2 +- v3, where bit j of e is the sign of v_j.
inline void portable_build(const float* values, int64_t begin, int64_t end, int64_t, int bits, uint8_t* tables) {
  auto* entries = reinterpret_cast<int32_t*>(tables) + begin * kGroupsPerWord * kEntries;
  for (int64_t g = begin * kGroupsPerWord; g < end * kGroupsPerWord; ++g, entries += kEntries, values += kGroup) {
    const float* v = values;
    float low[4], high[4];
    for (int e = 0; e < 4; ++e) {
      low[e] = (e & 1 ? v[0] : -v[0]) + (e & 2 ? v[1] : -v[1]);
      high[e] = (e & 1 ? v[2] : -v[2]) + (e & 2 ? v[3] : -v[3]);
    }
    for (int e = 0; e < kEntries; ++e)
      entries[e] = static_cast<int32_t>(low[e & 3] + high[e >> 2]) + (1 << (bits - 1));
  }
}

inline void portable_multiply(const Tile& tile, const Tables& tables, int64_t tokens, int bits, float* y) {
  const int64_t lookups = tile.count * kGroupsPerWord;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t b = 0; b < kBlocks; ++b) {
      int64_t sums[kRows] = {};
      const auto* entries = reinterpret_cast<const int32_t*>(tables.data + t * tables.stride);
      for (int64_t w = 0; w < tile.count; ++w, entries += kGroupsPerWord * kEntries)
        for (int64_t r = 0; r < kRows; ++r) {
          const uint32_t word = tile.words[b][w * kRows + r];
          for (int64_t g = 0; g < kGroupsPerWord; ++g)
            sums[r] += entries[g * kEntries + ((word >> (kGroup * g)) & (kEntries - 1))];
        }
      for (int64_t r = 0; r < kRows; ++r)
        y[t * kTileRows + b * kRows + r] = finish(static_cast<double>(sums[r]), lookups, bits, tables.units[t]);
    }
  }
}

inline void portable_half_to_float(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t exponent = (from[i] >> 10) & 31, mantissa = from[i] & 1023;
    float value = std::ldexp(static_cast<float>(exponent == 0 ? mantissa : mantissa | 1024),
                             static_cast<int>(exponent == 0 ? 1 : exponent) - 25);
    if (exponent == 31) value = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::nanf("");
    to[i] = from[i] & 0x8000 ? -value : value;
  }
}

inline void portable_float_to_half(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(from[i]);
    uint16_t half;
    if (!(size <= std::numeric_limits<float>::max())) {
      half = size != size ? 0x7E00 : 0x7C00;
    } else {
      // Count in units of the half's last place; from 2^-14 on, an overflow of the mantissa raises the exponent.
      const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
      const float places = std::nearbyint(std::ldexp(size, 10 - exponent));
      const int bits = size < 0x1p-14f ? static_cast<int>(places) : static_cast<int>(places) + (exponent + 14) * 1024;
      half = static_cast<uint16_t>(std::min(bits, 0x7C00));
    }
    to[i] = static_cast<uint16_t>(half | (std::signbit(from[i]) ? 0x8000 : 0));
  }
}

constexpr Kernel kPortable{"portable", 0, 8, portable_table_bytes, portable_peaks, portable_build,
                           portable_multiply, portable_half_to_float, portable_float_to_half};

}  // namespace dbf

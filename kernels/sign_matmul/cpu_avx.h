// Intel and AMD: AVX2, AVX-512 (F, BW, VL, DQ), and AVX-512 with VBMI and VNNI.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_types.h"

#define DBF_AVX2 __attribute__((target("avx2,f16c")))
#define DBF_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define DBF_AVX512_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")))

namespace dbf {

// --- for all of them, in AVX2 ----------------------------------------------------------------------------------

namespace avx {

DBF_AVX2 inline Peaks peaks(const float* values, int64_t groups) {
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  __m256i value = _mm256_setzero_si256();  // as integers, absolute values keep their order, and NaN is the largest
  __m256 group = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; g += 2) {
    const __m256 v = _mm256_and_ps(_mm256_loadu_ps(values + g * kGroup), no_sign);
    value = _mm256_max_epu32(value, _mm256_castps_si256(v));
    const __m256 pairs = _mm256_add_ps(v, _mm256_permute_ps(v, 0xB1));
    group = _mm256_max_ps(group, _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 0x4E)));
  }
  alignas(32) uint32_t sizes[8];
  alignas(32) float sums[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sizes), value);
  _mm256_store_ps(sums, group);
  const uint32_t largest = *std::max_element(sizes, sizes + 8);
  Peaks peaks{0.0f, *std::max_element(sums, sums + 8)};
  std::memcpy(&peaks.value, &largest, 4);
  return peaks;
}

DBF_AVX2 inline void half_to_float(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = _cvtsh_ss(from[i]);
}

DBF_AVX2 inline void float_to_half(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

// A mask that flips the sign of entries whose bit `bit` is 0. Lanes 0-3 hold the entries from `first` on, lanes 4-7 those
// from first + 8 on.
DBF_AVX2 inline __m256 flips(int first, int bit) {
  alignas(32) int32_t mask[8];
  for (int i = 0; i < 8; ++i) {
    const int entry = first + i % 4 + i / 4 * 8;
    mask[i] = entry >> bit & 1 ? 0 : INT32_MIN;
  }
  return _mm256_load_ps(reinterpret_cast<const float*>(mask));
}

// Tables for cpu_bytes.h.
DBF_AVX2 inline void build(const float* values, int64_t begin, int64_t end, int64_t, int bits, uint8_t* tables) {
  const int planes = (bits + 5) / 6;
  __m256 flip[2][kGroup];
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < kGroup; ++j) flip[half][j] = flips(4 * half, j);
  const __m256i bias = _mm256_set1_epi32(1 << (bits - 1));
  // Puts bytes p of the four entries of a lane side by side.
  const __m256i gather = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t g = begin * kGroupsPerWord; g < end * kGroupsPerWord; ++g, values += kGroup) {
    uint8_t* to = tables + (g / 4 * 4 * planes + g % 4) * kEntries;
    __m256 v[kGroup];
    for (int j = 0; j < kGroup; ++j) v[j] = _mm256_broadcast_ss(values + j);
    __m256i planes_of_half[2];
    for (int half = 0; half < 2; ++half) {
      const __m256* f = flip[half];
      const __m256 low = _mm256_add_ps(_mm256_xor_ps(v[0], f[0]), _mm256_xor_ps(v[1], f[1]));
      const __m256 high = _mm256_add_ps(_mm256_xor_ps(v[2], f[2]), _mm256_xor_ps(v[3], f[3]));
      const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_add_ps(low, high)), bias);
      const __m256i p0 = _mm256_and_si256(e, _mm256_set1_epi32(0x3F));
      const __m256i p1 = _mm256_and_si256(_mm256_slli_epi32(e, 2), _mm256_set1_epi32(0x3F00));
      const __m256i p2 = _mm256_and_si256(_mm256_slli_epi32(e, 4), _mm256_set1_epi32(0x3F0000));
      const __m256i p3 = _mm256_and_si256(_mm256_slli_epi32(e, 6), _mm256_set1_epi32(0x3F000000));
      planes_of_half[half] = _mm256_shuffle_epi8(_mm256_or_si256(_mm256_or_si256(p0, p1), _mm256_or_si256(p2, p3)), gather);
    }
    // The lanes of the first register hold entries 0-3 and 8-11, those of the second 4-7 and 12-15.
    const __m256i p01 = _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(planes_of_half[0], planes_of_half[1]), 0xD8);
    const __m256i p23 = _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(planes_of_half[0], planes_of_half[1]), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(p01));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 64), _mm256_extracti128_si256(p01, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 128), _mm256_castsi256_si128(p23));
    if (planes == 4) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 192), _mm256_extracti128_si256(p23, 1));
  }
}

}  // namespace avx

// --- AVX2: 32 rows in a register ------------------------------------------------------------------------------------

namespace avx2 {

#define DBF_TARGET DBF_AVX2
using Bytes = __m256i;
constexpr int kBytes = 32;

DBF_TARGET inline Bytes zero() { return _mm256_setzero_si256(); }
DBF_TARGET inline Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
DBF_TARGET inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
DBF_TARGET inline Bytes look_up(const uint8_t* table, Bytes index) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
}
DBF_TARGET inline Bytes add8(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
DBF_TARGET inline Bytes add16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
DBF_TARGET inline Bytes high_bytes(Bytes v) { return _mm256_srli_epi16(v, 8); }
DBF_TARGET inline void store(void* to, Bytes v) { _mm256_store_si256(static_cast<__m256i*>(to), v); }

// Register v of four holds the words of eight rows from 8 (v % 2) on, in block 2 pass + v / 2. In each half of a register
// bytes of equal number are put side by side; the rest is a transposition of four by four double words.
DBF_TARGET inline void load_columns(const Tile& tile, int64_t pass, int64_t w, Bytes* c) {
  const __m256i gather = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m256i v[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t* from = tile.words[2 * pass + i / 2] + w * kRows + i % 2 * 8;
    _mm_prefetch(reinterpret_cast<const char*>(from) + tile.prefetch_bytes, _MM_HINT_T1);
    v[i] = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), gather);
  }
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i d = _mm256_unpacklo_epi32(v[2], v[3]), e = _mm256_unpackhi_epi32(v[2], v[3]);
  c[0] = _mm256_unpacklo_epi64(a, d);
  c[1] = _mm256_unpackhi_epi64(a, d);
  c[2] = _mm256_unpacklo_epi64(b, e);
  c[3] = _mm256_unpackhi_epi64(b, e);
}
inline int64_t row_of(int64_t pass, int64_t position) {
  const int64_t half = position / 16, source = position / 4 % 4;
  return (2 * pass + source / 2) * kRows + source % 2 * 8 + half * 4 + position % 4;
}

#include "cpu_bytes.h"
#undef DBF_TARGET

}  // namespace avx2

constexpr Kernel kAvx2{"avx2", 0, 8, avx2::table_bytes, avx::peaks, avx::build,
                       avx2::multiply, avx::half_to_float, avx::float_to_half};

// --- AVX-512 without VBMI: 64 rows in a register --------------------------------------------------------------------

namespace avx512 {

#define DBF_TARGET DBF_AVX512
using Bytes = __m512i;
constexpr int kBytes = 64;

DBF_TARGET inline Bytes zero() { return _mm512_setzero_si512(); }
DBF_TARGET inline Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
DBF_TARGET inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
DBF_TARGET inline Bytes look_up(const uint8_t* table, Bytes index) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), index);
}
DBF_TARGET inline Bytes add8(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
DBF_TARGET inline Bytes add16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
DBF_TARGET inline Bytes high_bytes(Bytes v) { return _mm512_srli_epi16(v, 8); }
DBF_TARGET inline void store(void* to, Bytes v) { _mm512_store_si512(to, v); }

// As for AVX2; register v holds the words of the 16 rows of block v.
DBF_TARGET inline void load_columns(const Tile& tile, int64_t, int64_t w, Bytes* c) {
  const __m512i gather = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i v[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t* from = tile.words[i] + w * kRows;
    _mm_prefetch(reinterpret_cast<const char*>(from) + tile.prefetch_bytes, _MM_HINT_T1);
    v[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(from), gather);
  }
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i d = _mm512_unpacklo_epi32(v[2], v[3]), e = _mm512_unpackhi_epi32(v[2], v[3]);
  c[0] = _mm512_unpacklo_epi64(a, d);
  c[1] = _mm512_unpackhi_epi64(a, d);
  c[2] = _mm512_unpacklo_epi64(b, e);
  c[3] = _mm512_unpackhi_epi64(b, e);
}
inline int64_t row_of(int64_t, int64_t position) {
  return position / 4 % 4 * kRows + position / 16 * 4 + position % 4;
}

#include "cpu_bytes.h"
#undef DBF_TARGET

}  // namespace avx512

constexpr Kernel kAvx512{"avx512", 0, 8, avx512::table_bytes, avx::peaks, avx::build,
                         avx512::multiply, avx::half_to_float, avx::float_to_half};

// --- AVX-512 with VBMI and VNNI: 16 rows in a register --------------------------------------------------------------
//
// Byte j of a double word holds columns 8 j ... 8 j + 7 of one row. A register of tables holds four tables of 16 bytes,
// one for each j, and bits 4-5 of the index of byte j are j. So one look-up gives four bytes for each of 16 rows, and
// vpdpbusd adds up the four of each row: a multiply-add by ones.
// Tables of a word: [low or high nibbles][plane of 8 bits][j][16 entries].

namespace avx512_vbmi {

inline int64_t table_bytes(int64_t words, int bits) { return words * kGroupsPerWord * (bits / 8) * kEntries; }

// Puts bytes p of all 16 double words side by side, for p = 0 ... 3.
DBF_AVX512_VBMI inline __m512i gather_bytes() {
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i % 16 * 4 + i / 16);
  return _mm512_load_si512(order);
}

DBF_AVX512_VBMI inline void build_24_bits(const float* values, int64_t words, uint8_t* tables) {
  const __m512i entry = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i flip[kGroup];
  for (int j = 0; j < kGroup; ++j)
    flip[j] = _mm512_mask_set1_epi32(_mm512_setzero_si512(),
                                     _mm512_testn_epi32_mask(entry, _mm512_set1_epi32(1 << j)), INT32_MIN);
  const __m512i bias = _mm512_set1_epi32(1 << 23), gather = gather_bytes();
  for (int64_t w = 0; w < words; ++w, values += kWordBits) {
    for (int nibble = 0; nibble < 2; ++nibble, tables += 3 * 64) {
      __m512i q[4];
      for (int j = 0; j < 4; ++j) {
        const float* v = values + 8 * j + 4 * nibble;
        const auto signed_value = [&](int i) DBF_AVX512_VBMI {
          return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_set1_ps(v[i])), flip[i]));
        };
        const __m512 low = _mm512_add_ps(signed_value(0), signed_value(1));
        const __m512 high = _mm512_add_ps(signed_value(2), signed_value(3));
        const __m512i sum = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_add_ps(low, high)), bias);
        q[j] = _mm512_permutexvar_epi8(gather, sum);
      }
      const __m512i a = _mm512_shuffle_i32x4(q[0], q[1], 0x44), b = _mm512_shuffle_i32x4(q[2], q[3], 0x44);
      const __m512i d = _mm512_shuffle_i32x4(q[0], q[1], 0xEE), e = _mm512_shuffle_i32x4(q[2], q[3], 0xEE);
      _mm512_storeu_si512(tables, _mm512_shuffle_i32x4(a, b, 0x88));
      _mm512_storeu_si512(tables + 64, _mm512_shuffle_i32x4(a, b, 0xDD));
      _mm512_storeu_si512(tables + 128, _mm512_shuffle_i32x4(d, e, 0x88));
    }
  }
}

// Values are whole numbers of 16 bits: one instruction adds or subtracts two of them for all 16 entries.
DBF_AVX512_VBMI inline void build_16_bits(const float* values, int64_t words, uint8_t* tables) {
  alignas(64) int16_t first[32], second[32];  // the signs of values 0 and 1 in each entry, and of values 2 and 3
  for (int i = 0; i < 32; ++i) {
    first[i] = i / 2 >> (i % 2) & 1 ? 1 : -1;
    second[i] = i / 2 >> (i % 2 + 2) & 1 ? 1 : -1;
  }
  const __m512i signs01 = _mm512_load_si512(first), signs23 = _mm512_load_si512(second);
  const __m512i bias = _mm512_set1_epi32(1 << 15), gather = gather_bytes();
  for (int64_t w = 0; w < words; ++w, values += kWordBits) {
    alignas(64) int32_t pairs[kWordBits / 2];
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_loadu_ps(values)));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_loadu_ps(values + 16)));
    _mm512_store_si512(pairs, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    for (int nibble = 0; nibble < 2; ++nibble, tables += 2 * 64) {
      const auto sums = [&](int j) DBF_AVX512_VBMI {
        const int32_t* v = pairs + 4 * j + 2 * nibble;
        const __m512i half = _mm512_dpwssd_epi32(bias, _mm512_set1_epi32(v[0]), signs01);
        return _mm512_dpwssd_epi32(half, _mm512_set1_epi32(v[1]), signs23);
      };
      // Two entries of 16 bits in a double word.
      const auto both = [&](int j) DBF_AVX512_VBMI {
        return _mm512_permutexvar_epi8(gather, _mm512_or_si512(sums(j), _mm512_slli_epi32(sums(j + 1), 16)));
      };
      const __m512i a = both(0), b = both(2);
      _mm512_storeu_si512(tables, _mm512_shuffle_i32x4(a, b, 0x88));
      _mm512_storeu_si512(tables + 64, _mm512_shuffle_i32x4(a, b, 0xDD));
    }
  }
}

DBF_AVX512_VBMI inline void build(const float* values, int64_t begin, int64_t end, int64_t, int bits, uint8_t* tables) {
  tables += table_bytes(begin, bits);
  bits == 24 ? build_24_bits(values, end - begin, tables) : build_16_bits(values, end - begin, tables);
}

template <int Planes, int Tokens>
DBF_AVX512_VBMI void multiply_tokens(const Tile& tile, const Tables& tables, float* y) {
  const __m512i ones = _mm512_set1_epi8(1), nibble = _mm512_set1_epi8(15), table_of_byte = _mm512_set1_epi32(0x30201000);
  __m512i sums[Tokens][Planes][kBlocks];
  for (int t = 0; t < Tokens; ++t)
    for (int p = 0; p < Planes; ++p)
      for (int b = 0; b < kBlocks; ++b) sums[t][p][b] = _mm512_setzero_si512();
  const uint8_t* table = tables.data;
  for (int64_t w = 0; w < tile.count; ++w) {
    for (int half = 0; half < 2; ++half, table += Planes * 64) {
      __m512i index[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t* from = tile.words[b] + w * kRows;
        __m512i words = _mm512_loadu_si512(from);
        if (half == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(from) + tile.prefetch_bytes, _MM_HINT_T1);
        } else {
          words = _mm512_srli_epi32(words, 4);
        }
        index[b] = _mm512_ternarylogic_epi32(words, nibble, table_of_byte, 0xEA);  // (words & nibble) | table_of_byte
      }
      for (int t = 0; t < Tokens; ++t)
        for (int p = 0; p < Planes; ++p) {
          const __m512i entries = _mm512_loadu_si512(table + t * tables.stride + p * 64);
          for (int b = 0; b < kBlocks; ++b)
            sums[t][p][b] = _mm512_dpbusd_epi32(sums[t][p][b], _mm512_permutexvar_epi8(index[b], entries), ones);
        }
    }
  }
  const double bias = static_cast<double>(tile.count * kGroupsPerWord) * (1 << (8 * Planes - 1));
  for (int t = 0; t < Tokens; ++t) {
    const __m512d unit = _mm512_set1_pd(tables.units[t]);
    for (int b = 0; b < kBlocks; ++b)
      for (int half = 0; half < 2; ++half) {
        __m512d sum = _mm512_set1_pd(-bias);
        for (int p = 0; p < Planes; ++p) {
          const __m512i lanes = sums[t][p][b];
          const __m256i eight = half == 0 ? _mm512_castsi512_si256(lanes) : _mm512_extracti64x4_epi64(lanes, 1);
          const __m512d plane = _mm512_cvtepi32_pd(eight);
          sum = _mm512_add_pd(sum, _mm512_mul_pd(plane, _mm512_set1_pd(static_cast<double>(1 << (8 * p)))));
        }
        _mm256_storeu_ps(y + t * kTileRows + b * kRows + half * 8, _mm512_cvtpd_ps(_mm512_mul_pd(sum, unit)));
      }
  }
}

DBF_AVX512_VBMI inline void multiply(const Tile& tile, const Tables& tables, int64_t tokens, int bits, float* y) {
  int64_t t = 0;
  const auto rest = [&]() DBF_AVX512_VBMI {
    return Tables{tables.data + t * tables.stride, tables.stride, tables.units + t};
  };
  for (; t + 2 <= tokens; t += 2)
    bits == 24 ? multiply_tokens<3, 2>(tile, rest(), y + t * kTileRows)
               : multiply_tokens<2, 2>(tile, rest(), y + t * kTileRows);
  if (t < tokens)
    bits == 24 ? multiply_tokens<3, 1>(tile, rest(), y + t * kTileRows)
               : multiply_tokens<2, 1>(tile, rest(), y + t * kTileRows);
}

}  // namespace avx512_vbmi

constexpr Kernel kAvx512Vbmi{"avx512_vbmi", 0, 8, avx512_vbmi::table_bytes, avx::peaks, avx512_vbmi::build,
                             avx512_vbmi::multiply, avx::half_to_float, avx::float_to_half};

}  // namespace dbf

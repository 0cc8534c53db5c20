// Intel's AMX: a matrix unit that multiplies bytes, for several tokens at once.
//
// Signs are written out as bytes of ±1, 16 rows by 64 columns at a time; one instruction then multiplies them by 16 rows of
// activations. Those are whole numbers in units of the token, as the entries of look-up tables are sums of them, split into
// signed bytes: value = Σ 256^p byte[p], -128 <= byte <= 127. So sums are exact, and the bits are those of a look-up.
// The "tables" of a token are its planes, one after the other: byte p of all columns, padded to a multiple of 64.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_avx.h"
#include "cpu_types.h"

#define DBF_AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,amx-tile,amx-int8")))

namespace dbf::amx {

constexpr int64_t kChunk = 64;  // columns, bytes of a row of a matrix register
constexpr int64_t kSide = 16;   // rows of a matrix register
constexpr int64_t kRegister = kSide * kChunk;
constexpr int64_t kBlocksAtOnce = 2;  // of 16 rows; with two registers of activations they fill the eight that there are
constexpr int64_t kChunksAtOnce = 8;  // whose signs are written out before they are read: half of the first-level cache
constexpr int64_t kWordsPerChunk = kChunk / kWordBits;
constexpr int64_t kMost = kMostAtOnce * 3;  // rows of activations: planes of all tokens

inline int64_t plane_bytes(int64_t words) { return ceil_div(words, kWordsPerChunk) * kChunk; }
inline int64_t table_bytes(int64_t words, int bits) { return bits / 8 * plane_bytes(words); }

DBF_AMX inline void build(const float* values, int64_t begin, int64_t end, int64_t words, int bits, uint8_t* tables) {
  const int64_t stride = plane_bytes(words), planes = bits / 8;
  for (int64_t i = begin * kWordBits; i < end * kWordBits; i += 16, values += 16) {
    __m512i value = _mm512_cvtps_epi32(_mm512_loadu_ps(values));
    for (int64_t p = 0; p < planes; ++p) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + p * stride + i), _mm512_cvtepi32_epi8(value));
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(value, 24), 24);
      value = _mm512_srai_epi32(_mm512_sub_epi32(value, low), 8);
    }
  }
  if (end == words)
    for (int64_t p = 0; p < planes; ++p)
      std::memset(tables + p * stride + words * kWordBits, 0, static_cast<size_t>(stride - words * kWordBits));
}

// How many rows and bytes each matrix register has.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 3 are sums [row of activations, row of signs], 4 and 5 activations, 6 and 7 signs of two blocks.
DBF_AMX inline void configure(int64_t first, int64_t second) {
  Shapes shapes;
  const int64_t rows[8] = {first, first, second, second, first, second, kSide, kSide};
  for (int i = 0; i < 8; ++i) {
    shapes.bytes[i] = kChunk;
    shapes.rows[i] = static_cast<uint8_t>(rows[i]);
  }
  _tile_loadconfig(&shapes);
}

// Writes the signs of a chunk of columns of a block as the unit takes them: row i has columns 4 i ... 4 i + 3 of all 16 rows.
DBF_AMX inline void write_out(const Tile& tile, int64_t block, int64_t chunk, uint8_t* to) {
  // Eight bits from a bit on in each byte: columns 4 i + j of two rows in a quad word. Of these the lowest decides; an affine
  // map of the bits makes 1 of 1, and 255, which is -1, of 0.
  const __m512i first = _mm512_set1_epi64(0x2322212003020100), step = _mm512_set1_epi64(0x0404040404040404);
  const __m512i lowest = _mm512_set1_epi64(0x0001010101010101);
  for (int64_t half = 0; half < kWordsPerChunk; ++half) {
    const int64_t w = chunk * kWordsPerChunk + half;
    if (w == tile.count) {  // activations are zero there
      std::memset(to, 0, kRegister / 2);
      return;
    }
    const uint32_t* from = tile.words[block] + w * kRows;
    _mm_prefetch(reinterpret_cast<const char*>(from) + tile.prefetch_bytes, _MM_HINT_T1);
    const __m512i words = _mm512_loadu_si512(from);
    __m512i bits = first;
    for (int i = 0; i < kGroupsPerWord; ++i, to += kChunk) {
      const __m512i bytes = _mm512_multishift_epi64_epi8(bits, words);
      _mm512_store_si512(to, _mm512_gf2p8affine_epi64_epi8(bytes, lowest, 0xFF));
      bits = _mm512_add_epi8(bits, step);
    }
  }
}

// Adds to sums[row of activations, row of signs in two blocks]: products of `count` rows of activations, 2 or more, and of the
// signs of some chunks of columns in `panel`.
DBF_AMX inline void multiply_rows(const uint8_t* activations, int64_t stride, int64_t count, const uint8_t* panel,
                                  int64_t chunks, int32_t* sums) {
  constexpr int64_t kBoth = kBlocksAtOnce * kRows, kBytes = kBoth * 4;
  const int64_t upper = (count + 1) / 2;
  const uint8_t *above = activations, *below = activations + upper * stride;
  int32_t* lower_sums = sums + upper * kBoth;
  _tile_loadd(0, sums, kBytes);
  _tile_loadd(1, sums + kRows, kBytes);
  _tile_loadd(2, lower_sums, kBytes);
  _tile_loadd(3, lower_sums + kRows, kBytes);
  for (int64_t c = 0; c < chunks; ++c, panel += kBlocksAtOnce * kRegister, above += kChunk, below += kChunk) {
    _tile_loadd(4, above, stride);
    _tile_loadd(6, panel, kChunk);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, panel + kRegister, kChunk);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, below, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, kBytes);
  _tile_stored(1, sums + kRows, kBytes);
  _tile_stored(2, lower_sums, kBytes);
  _tile_stored(3, lower_sums + kRows, kBytes);
}

DBF_AMX inline void multiply(const Tile& tile, const Tables& tables, int64_t tokens, int bits, float* y) {
  alignas(64) uint8_t panel[kChunksAtOnce * kBlocksAtOnce * kRegister];
  alignas(64) int32_t sums[kMost * kBlocksAtOnce * kRows];
  const int64_t planes = bits / 8, rows = tokens * planes, stride = tables.stride / planes;
  const int64_t groups = ceil_div(rows, 2 * kSide), chunks = ceil_div(tile.count, kWordsPerChunk);
  int64_t shape = 0;
  for (int64_t block = 0; block < kBlocks; block += kBlocksAtOnce) {
    std::memset(sums, 0, static_cast<size_t>(rows) * kBlocksAtOnce * kRows * 4);
    for (int64_t c = 0; c < chunks; c += kChunksAtOnce) {
      const int64_t count = std::min(kChunksAtOnce, chunks - c);
      for (int64_t i = 0; i < count * kBlocksAtOnce; ++i)
        write_out(tile, block + i % kBlocksAtOnce, c + i / kBlocksAtOnce, panel + i * kRegister);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = rows * group / groups, in_group = rows * (group + 1) / groups - first;
        if (in_group != shape) configure((in_group + 1) / 2, in_group / 2);
        shape = in_group;
        multiply_rows(tables.data + first * stride + c * kChunk, stride, in_group, panel, count,
                      sums + first * kBlocksAtOnce * kRows);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const __m512d unit = _mm512_set1_pd(tables.units[t]);
      for (int64_t i = 0; i < kBlocksAtOnce * kRows; i += 8) {
        __m512d sum = _mm512_setzero_pd();
        for (int64_t p = planes - 1; p >= 0; --p) {
          const int32_t* part = sums + (t * planes + p) * kBlocksAtOnce * kRows + i;
          const __m512d plane = _mm512_cvtepi32_pd(_mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
          sum = _mm512_add_pd(_mm512_mul_pd(sum, _mm512_set1_pd(256.0)), plane);
        }
        _mm256_storeu_ps(y + t * kTileRows + block * kRows + i, _mm512_cvtpd_ps(_mm512_mul_pd(sum, unit)));
      }
    }
  }
  _tile_release();
}

}  // namespace dbf::amx

namespace dbf {

constexpr Kernel kAmx{"amx", 6, kMostAtOnce, amx::table_bytes, avx::peaks, amx::build,
                      amx::multiply, avx::half_to_float, avx::float_to_half};

}  // namespace dbf

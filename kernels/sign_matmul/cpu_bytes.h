// The kernel of instruction sets that look up 16 bytes at a time: a register holds one byte of each of several rows.
//
// No #pragma once: every instruction set includes this text in a namespace of its own, after the headers below and after
// it has defined DBF_TARGET (the attribute of its functions) and the operations that are declared below. Without
// DBF_TARGET, as editors and checks include it, the text stands alone with these declarations.
//
// Entries are split into planes of 6 bits: four look-ups then add up within a byte. Pairs of bytes are summed as 16-bit
// numbers: `all` of both bytes, modulo 2^16, and `upper` of the upper one, so that nothing has to be unpacked.
// Tables of a word: [half][plane][byte 2 half + j][nibble][16 entries], so that a step reads them from front to back.

#ifndef DBF_TARGET
#include <algorithm>
#include <cstdint>

#include "cpu_types.h"
#define DBF_TARGET
#define DBF_BYTES_ALONE

namespace dbf {

constexpr int kBytes = 16;  // the size of a register, a multiple of 16
struct Bytes {
  uint8_t lanes[kBytes];
};

Bytes zero();
Bytes low_nibbles(Bytes v);
Bytes high_nibbles(Bytes v);
Bytes look_up(const uint8_t* table, Bytes index);
Bytes add8(Bytes a, Bytes b);
Bytes add16(Bytes a, Bytes b);  // of 16-bit lanes
Bytes high_bytes(Bytes v);      // of 16-bit lanes, shifted down
void store(void* to, Bytes v);  // to aligned memory
// c[j], j < 4, gets byte j of word w of the kBytes rows of a pass, in an order of the instruction set's own.
void load_columns(const Tile& tile, int64_t pass, int64_t w, Bytes* c);
// The row of the tile that stands at a position of c[j].
int64_t row_of(int64_t pass, int64_t position);

#endif

constexpr int kPlaneBits = 6;
constexpr int64_t kWordsPerFlush = 128;  // 2 * 128 sums of at most 4 * 63 stay below 2^16

inline constexpr int planes_of(int bits) { return (bits + kPlaneBits - 1) / kPlaneBits; }

inline int64_t table_bytes(int64_t words, int bits) { return words * kGroupsPerWord * planes_of(bits) * kEntries; }

template <int Planes>
DBF_TARGET void multiply_planes(const Tile& tile, const uint8_t* table, int bits, double unit, int64_t pass, float* y) {
  uint32_t even[Planes][kBytes / 2] = {}, odd[Planes][kBytes / 2] = {};
  for (int64_t first = 0; first < tile.count; first += kWordsPerFlush) {
    Bytes all[Planes], upper[Planes];
    for (int p = 0; p < Planes; ++p) all[p] = upper[p] = zero();
    const int64_t last = std::min(first + kWordsPerFlush, tile.count);
    for (int64_t w = first; w < last; ++w) {
      Bytes c[4];
      load_columns(tile, pass, w, c);
      for (int half = 0; half < 2; ++half) {
        const Bytes a = low_nibbles(c[2 * half]), b = high_nibbles(c[2 * half]);
        const Bytes d = low_nibbles(c[2 * half + 1]), e = high_nibbles(c[2 * half + 1]);
        for (int p = 0; p < Planes; ++p, table += 4 * kEntries) {
          const Bytes ab = add8(look_up(table, a), look_up(table + kEntries, b));
          const Bytes de = add8(look_up(table + 2 * kEntries, d), look_up(table + 3 * kEntries, e));
          const Bytes sum = add8(ab, de);
          all[p] = add16(all[p], sum);
          upper[p] = add16(upper[p], high_bytes(sum));
        }
      }
    }
    for (int p = 0; p < Planes; ++p) {
      alignas(64) uint16_t both[kBytes / 2], high[kBytes / 2];
      store(both, all[p]);
      store(high, upper[p]);
      for (int i = 0; i < kBytes / 2; ++i) even[p][i] += static_cast<uint16_t>(both[i] - (high[i] << 8));
      for (int i = 0; i < kBytes / 2; ++i) odd[p][i] += high[i];
    }
  }
  for (int i = 0; i < kBytes; ++i) {
    double sum = 0.0;
    for (int p = Planes - 1; p >= 0; --p) sum = sum * (1 << kPlaneBits) + (i % 2 == 0 ? even : odd)[p][i / 2];
    y[row_of(pass, i)] = finish(sum, tile.count * kGroupsPerWord, bits, unit);
  }
}

DBF_TARGET inline void multiply(const Tile& tile, const Tables& tables, int64_t tokens, int bits, float* y) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t pass = 0; pass < kTileRows / kBytes; ++pass) {
      const uint8_t* table = tables.data + t * tables.stride;
      bits == 24 ? multiply_planes<planes_of(24)>(tile, table, bits, tables.units[t], pass, y + t * kTileRows)
                 : multiply_planes<planes_of(16)>(tile, table, bits, tables.units[t], pass, y + t * kTileRows);
    }
}

#ifdef DBF_BYTES_ALONE
}  // namespace dbf
#undef DBF_BYTES_ALONE
#undef DBF_TARGET
#endif

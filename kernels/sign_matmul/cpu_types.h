// Sizes and types that all instruction sets share.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dbf {

constexpr int64_t kWordBits = 32;
constexpr int64_t kGroup = 4;                          // columns that share a table
constexpr int64_t kEntries = 16;                       // 2 ^ kGroup signed sums
constexpr int64_t kGroupsPerWord = kWordBits / kGroup;
constexpr int64_t kRows = 16;                          // rows whose words lie side by side
constexpr int64_t kBlocks = 4;                         // blocks of kRows rows in a tile
constexpr int64_t kTileRows = kRows * kBlocks;
constexpr int64_t kMostAtOnce = 64;                    // tokens in one call of a kernel

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that is reused by later calls: fresh pages would cost more than the product of a small layer.
template <typename T>
class Scratch {
 public:
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    if (memory_.size() < bytes) memory_.resize(bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t(63));
  }

 private:
  std::vector<uint8_t> memory_;
};

// Four blocks of 16 rows: words[b][w * kRows + r] is word w of row r of block b.
struct Tile {
  const uint32_t* words[kBlocks];
  int64_t count;           // words of a row
  int64_t prefetch_bytes;  // how far ahead of `words` the next tile lies
};

// The look-up tables of several tokens, all of one size.
struct Tables {
  const uint8_t* data;
  int64_t stride;       // bytes from one token to the next
  const double* units;  // one for each token
};

// The largest absolute value of an activation, and the largest sum of absolute values in a group.
struct Peaks {
  float value;  // infinite or NaN if an activation is
  float group;
};

// The functions of an instruction set, which has its own layout of tables.
struct Kernel {
  const char* name;
  int64_t least_tokens;    // from which on it is faster than those behind it in the list of those that a processor runs
  int64_t tokens_at_once;  // most in a call of multiply
  // Bytes of the tables of one token.
  int64_t (*table_bytes)(int64_t words, int bits);
  Peaks (*peaks)(const float* values, int64_t groups);
  // Fills the tables of the words [begin, end) of a token, which has `words`, from their 32 values each: whole numbers in units
  // of the token. An entry is the sum plus 2^(bits - 1), which makes it positive. `tables` are those of all words.
  void (*build)(const float* values, int64_t begin, int64_t end, int64_t words, int bits, uint8_t* tables);
  // y[t * kTileRows + r] = units[t] * the sum of row r, for a few tokens and all rows of a tile.
  void (*multiply)(const Tile& tile, const Tables& tables, int64_t tokens, int bits, float* y);
  void (*half_to_float)(const uint16_t* from, int64_t count, float* to);
  void (*float_to_half)(const float* from, int64_t count, uint16_t* to);
};

// Takes the biases of `lookups` entries out of their sum and multiplies by the unit.
inline float finish(double sum, int64_t lookups, int bits, double unit) {
  return static_cast<float>((sum - static_cast<double>(lookups) * static_cast<double>(int64_t(1) << (bits - 1))) * unit);
}

}  // namespace dbf

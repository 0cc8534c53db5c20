// Sizes and types that all instruction sets share.

#pragma once

#include <cstdint>

namespace dbf_rows {

constexpr int64_t kRows = 16;         // rows whose words lie side by side
constexpr int64_t kStep = 4;          // columns of one step: one byte of a 32-bit lane each
constexpr int64_t kDigits = 3;        // signed bytes of an activation
constexpr int64_t kTokensAtOnce = 8;  // most tokens in one call of a kernel
constexpr int64_t kMostColumns = 1 << 16;  // sums of bytes of a longer row would overflow 32 bits

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a row of a table looks like: its scales, then its codes.
struct Format {
  int64_t bits;         // of a code: 8, 6 or 4
  int64_t columns;
  int64_t group;        // columns of one scale; 0: the whole row, whose scale is a float32
  int64_t unit_steps() const { return bits == 8 ? 1 : bits == 4 ? 2 : 4; }  // steps of a unit of words
  int64_t unit_words() const { return bits == 6 ? 3 : 1; }
  int64_t units() const { return ceil_div(columns, unit_steps() * kStep); }
  int64_t steps() const { return units() * unit_steps(); }
  int64_t groups() const { return group == 0 ? 1 : ceil_div(columns, group); }
  int64_t group_units() const { return group == 0 ? units() : group / (unit_steps() * kStep); }
  int64_t scale_words() const { return group == 0 ? 1 : ceil_div(groups(), 2); }
  int64_t words() const { return scale_words() + units() * unit_words(); }
};

// The activations of a token as the kernel of an instruction set reads them.
struct Token {
  const int32_t* offsets;  // of each group and digit: what sums start at, since codes are stored without a sign
  const int8_t* digits;
};

// The functions of an instruction set, which has its own layout of digits.
struct Kernel {
  const char* name;
  int64_t step_bytes;  // of the digits of a step
  // Writes the digits of a step, digits[d][column], in the layout of the instruction set.
  void (*pack)(const int8_t (*digits)[kStep], int8_t* to);
  // y[t * kRows + r] = the sum over groups of scale * sum of row r, for a few tokens and the 16 rows of a block.
  void (*multiply)(const uint32_t* block, const Format& format, const Token* tokens, int64_t count, float* y);
};

}  // namespace dbf_rows

// The product with a block of 16 rows: a lane of 32 bits holds four columns of a row, or their sum.
//
// No #pragma once: every instruction set includes this text in a namespace of its own, after it has defined DBF_TARGET (the
// attribute of its functions) and the operations that are declared below. Without DBF_TARGET, as editors and checks include
// it, the text stands alone with these declarations.
//
// Activations are whole numbers of 24 bits, as three signed bytes. Sums of bytes are exact; those of the bytes and of the
// groups are added in float32, in one order: all instruction sets give the same bits.

#ifndef DBF_TARGET
#include <cstdint>

#include "cpu_types.h"
#define DBF_TARGET
#define DBF_BLOCK_ALONE

namespace dbf_rows {

struct Lanes {
  int32_t lanes[kRows];
};
struct Floats {
  float lanes[kRows];
};
using Codes = Lanes;

Lanes load(const uint32_t* words);
Lanes same(int32_t value);
Lanes both(Lanes a, Lanes b);    // bitwise and
Lanes either(Lanes a, Lanes b);  // bitwise or
template <int bits>
Lanes down(Lanes a);
template <int bits>
Lanes up(Lanes a);
template <int bits>
Codes codes_of(Lanes bytes);                                  // unsigned bytes of `bits` bits
Lanes add_products(Lanes sum, Codes codes, const int8_t* x);  // of one digit
constexpr int64_t kDigitBytes = 4;
Floats to_float(Lanes a);
Floats as_float(Lanes bits);
Floats times(Floats a, Floats b);
Floats times(Floats a, float b);
Floats plus(Floats a, Floats b);
Floats load(const float* from);
void store(float* to, Floats a);
void prefetch(const uint32_t* words);

#endif

constexpr int64_t kAhead = 64 * kRows;  // words that are fetched ahead: 4 KiB

template <int bits, int tokens>
DBF_TARGET inline void add_unit(const uint32_t* words, const Token* of, int64_t step, Lanes (*sums)[kDigits]) {
  constexpr int steps = bits == 8 ? 1 : bits == 4 ? 2 : 4;
  Codes codes[steps];
  if constexpr (bits == 8) {
    codes[0] = codes_of<8>(load(words));
  } else {
    const Lanes nibble = same(0x0F0F0F0F);
    const Lanes first = load(words);
    Lanes bytes[steps];
    bytes[0] = both(first, nibble);
    bytes[1] = both(down<4>(first), nibble);
    if constexpr (bits == 6) {
      const Lanes second = load(words + kRows), upper = load(words + 2 * kRows), mask = same(0x30303030);
      bytes[2] = both(second, nibble);
      bytes[3] = both(down<4>(second), nibble);
      bytes[0] = either(bytes[0], both(up<4>(upper), mask));
      bytes[1] = either(bytes[1], both(up<2>(upper), mask));
      bytes[2] = either(bytes[2], both(upper, mask));
      bytes[3] = either(bytes[3], both(down<2>(upper), mask));
    }
    for (int s = 0; s < steps; ++s) codes[s] = codes_of<bits>(bytes[s]);
  }
  prefetch(words + kAhead);
  for (int s = 0; s < steps; ++s)
    for (int t = 0; t < tokens; ++t)
      for (int d = 0; d < kDigits; ++d)
        sums[t][d] = add_products(sums[t][d], codes[s], of[t].digits + ((step + s) * kDigits + d) * kDigitBytes);
}

template <int bits, int tokens>
DBF_TARGET void multiply_tokens(const uint32_t* block, const Format& format, const Token* of, float* y) {
  constexpr int unit_words = bits == 6 ? 3 : 1, unit_steps = bits == 8 ? 1 : bits == 4 ? 2 : 4;
  const int64_t units = format.units(), groups = format.groups(), group_units = format.group_units();
  const uint32_t* codes = block + format.scale_words() * kRows;
  Floats total[tokens];
  for (int64_t g = 0; g < groups; ++g) {
    Lanes sums[tokens][kDigits];
    for (int t = 0; t < tokens; ++t)
      for (int d = 0; d < kDigits; ++d) sums[t][d] = same(of[t].offsets[g * kDigits + d]);
    const int64_t last = units < (g + 1) * group_units ? units : (g + 1) * group_units;
    for (int64_t u = g * group_units; u < last; ++u)
      add_unit<bits, tokens>(codes + u * unit_words * kRows, of, u * unit_steps, sums);
    Floats scale;
    if (format.group == 0) {
      scale = as_float(load(block));
    } else {  // two of bfloat16 in a word
      const Lanes pair = load(block + g / 2 * kRows);
      scale = as_float(g % 2 == 0 ? up<16>(pair) : both(pair, same(static_cast<int32_t>(0xFFFF0000))));
    }
    for (int t = 0; t < tokens; ++t) {
      const Floats low = plus(times(to_float(sums[t][1]), 256.0f), to_float(sums[t][0]));
      const Floats sum = times(scale, plus(times(to_float(sums[t][2]), 65536.0f), low));
      total[t] = g == 0 ? sum : plus(total[t], sum);
    }
  }
  for (int t = 0; t < tokens; ++t) store(y + t * kRows, total[t]);
}

template <int bits>
DBF_TARGET void multiply_bits(const uint32_t* block, const Format& format, const Token* of, int64_t count, float* y) {
  for (; count >= 4; count -= 4, of += 4, y += 4 * kRows) multiply_tokens<bits, 4>(block, format, of, y);
  if (count & 2) {
    multiply_tokens<bits, 2>(block, format, of, y);
    of += 2, y += 2 * kRows;
  }
  if (count & 1) multiply_tokens<bits, 1>(block, format, of, y);
}

DBF_TARGET inline void multiply(const uint32_t* block, const Format& format, const Token* of, int64_t count, float* y) {
  if (format.bits == 8) return multiply_bits<8>(block, format, of, count, y);
  if (format.bits == 6) return multiply_bits<6>(block, format, of, count, y);
  return multiply_bits<4>(block, format, of, count, y);
}

#ifdef DBF_BLOCK_ALONE
}  // namespace dbf_rows
#undef DBF_TARGET
#endif

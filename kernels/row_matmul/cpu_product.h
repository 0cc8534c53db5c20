// The product with a table of quantized rows on CPUs, for any instruction set.
//
//     y[m, n] = sum over groups g of scale[n, g] * sum over the columns k of the group of code[n, k] * x[m, k]
//
// Reading the table takes most of the time: its words are read once, in order, for up to kTokensAtOnce tokens at a time.
// Activations become whole numbers of 24 bits in a unit of the token, as exact as float32 is for the largest of them.
// Layout of the table: dbf_compile/rows.py.
//
// cpu_types.h <- cpu_portable.h, cpu_avx.h, cpu_neon.h (all around cpu_block.h) <- this file. None includes torch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../amx.h"
#include "cpu_portable.h"
#include "cpu_types.h"
#if defined(__x86_64__)
#include "cpu_avx.h"
#elif defined(__aarch64__)
#include "cpu_neon.h"
#endif

namespace dbf_rows {

struct Choice {
  const char* name;  // as $DBF_CPU_ISA has it, for all kernels
  const Kernel* kernel;
};

// What this processor runs, fastest first.
inline std::vector<Choice> usable_kernels() {
  std::vector<Choice> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && dbf::has_amx()) kernels.push_back({"amx", &avx512_vnni_kernel()});
  if (vnni) kernels.push_back({"avx512_vbmi", &avx512_vnni_kernel()});
  if (avx512) kernels.push_back({"avx512", vnni ? &avx512_vnni_kernel() : &avx2_kernel()});
  if (avx2) kernels.push_back({"avx2", &avx2_kernel()});
#elif defined(__aarch64__)
  kernels.push_back({"neon", &neon_kernel()});
#endif
  kernels.push_back({"portable", &portable_kernel()});
  return kernels;
}

// The kernel that $DBF_CPU_ISA names, else the fastest; null if this processor does not run the named one.
inline const Kernel* choose_kernel() {
  static const std::vector<Choice> usable = usable_kernels();
  const char* name = std::getenv("DBF_CPU_ISA");
  if (name == nullptr || *name == 0) return usable.front().kernel;
  for (const Choice& choice : usable)
    if (std::strcmp(choice.name, name) == 0) return choice.kernel;
  return nullptr;
}

inline std::string usable_names() {
  std::string names;
  for (const Choice& choice : usable_kernels()) names += (names.empty() ? "" : ", ") + std::string(choice.name);
  return names;
}

// A table in memory, words [rows, words]. Every full block of 16 rows holds word 0 of all 16 rows, then word 1 of all 16, and
// so on; the rows of an incomplete last block are stored one by one.
struct Table {
  const uint32_t* words;
  int64_t rows;
  Format format;

  int64_t blocks() const { return ceil_div(rows, kRows); }
  uint32_t word(int64_t row, int64_t w) const {
    const int64_t block = row / kRows, count = format.words();
    return (block + 1) * kRows <= rows ? words[(block * count + w) * kRows + row % kRows] : words[row * count + w];
  }
  // Block `index`; an incomplete one is copied.
  const uint32_t* block(int64_t index, std::vector<uint32_t>& copy) const {
    const int64_t count = format.words(), first = index * kRows;
    if (first + kRows <= rows) return words + first * count;
    copy.assign(count * kRows, 0);
    for (int64_t r = 0; first + r < rows; ++r)
      for (int64_t w = 0; w < count; ++w) copy[w * kRows + r] = words[(first + r) * count + w];
    return copy.data();
  }
  // The code of an entry, without its scale.
  int32_t code(int64_t row, int64_t column) const {
    const int64_t steps = format.unit_steps(), unit = column / (steps * kStep), step = column / kStep % steps;
    const int64_t first = format.scale_words() + unit * format.unit_words(), shift = 8 * (column % kStep);
    if (format.bits == 8) return static_cast<int32_t>(word(row, first) >> shift & 0xFF) - 128;
    const int32_t nibble = word(row, first + step / 2) >> (shift + step % 2 * 4) & 0xF;
    if (format.bits == 4) return nibble - 8;
    return nibble + static_cast<int32_t>(word(row, first + 2) >> (shift + 2 * step) & 3) * 16 - 32;
  }
  float scale(int64_t row, int64_t group) const {
    uint32_t bits = word(row, format.group == 0 ? 0 : group / 2);
    if (format.group != 0) bits = group % 2 == 0 ? bits << 16 : bits & 0xFFFF0000;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// The tokens of a call, as a kernel reads them.
class TokenDigits {
 public:
  void reserve(const Kernel& kernel, const Format& format, int64_t tokens) {
    kernel_ = &kernel;
    format_ = format;
    offset_count_ = format.groups() * kDigits;
    digit_bytes_ = format.steps() * kernel.step_bytes;
    offsets_.resize(std::max<size_t>(offsets_.size(), tokens * offset_count_));
    digits_.resize(std::max<size_t>(digits_.size(), tokens * digit_bytes_));
    units_.resize(tokens);
    finite_.resize(tokens);
    tokens_.resize(tokens);
  }

  // x: the activations of a token.
  void build(int64_t token, const float* x) {
    float peak = 0.0f;
    bool finite = true;
    for (int64_t k = 0; k < format_.columns; ++k) {
      const float size = std::fabs(x[k]);
      finite = finite && size <= std::numeric_limits<float>::max();
      peak = std::max(peak, size);
    }
    finite_[token] = finite;
    int32_t* offsets = offsets_.data() + token * offset_count_;
    int8_t* digits = digits_.data() + token * digit_bytes_;
    tokens_[token] = {offsets, digits};
    std::fill_n(offsets, offset_count_, 0);
    // A power of two, so that values which are exact in float32 stay exact. 8355711 is 127 in every digit.
    // At most 2^149, so that the unit is a float32.
    const int power = finite && peak > 0.0f ? std::min(std::ilogb(8355711.0 / static_cast<double>(peak)), 149) : 0;
    const double factor = finite ? std::ldexp(1.0, power) : 0.0;
    units_[token] = std::ldexp(1.0f, -power);
    const int64_t unit_columns = format_.unit_steps() * kStep, group_columns = format_.group_units() * unit_columns;
    const int32_t zero = 1 << (format_.bits - 1);  // the code that stands for it
    for (int64_t step = 0; step < format_.steps(); ++step) {
      int8_t split[kDigits][kStep];
      int32_t* offset = offsets + step * kStep / group_columns * kDigits;
      for (int64_t j = 0; j < kStep; ++j) {
        const int64_t k = step * kStep + j;
        int32_t value = k < format_.columns && finite ? rounded(x[k] * factor) : 0;
        for (int64_t d = 0; d < kDigits; ++d) {
          split[d][j] = static_cast<int8_t>(value);
          value = (value - split[d][j]) >> 8;
          offset[d] -= zero * split[d][j];
        }
      }
      kernel_->pack(split, digits + step * kernel_->step_bytes);
    }
  }

  const Token* tokens() const { return tokens_.data(); }
  float unit(int64_t token) const { return units_[token]; }
  bool finite(int64_t token) const { return finite_[token]; }

  // The sum as float32 has it if an activation is infinite or NaN; the finite ones do not matter then.
  float sum_of_infinite(const float* x, const Table& table, int64_t row) const {
    float sum = 0.0f;
    for (int64_t k = 0; k < format_.columns && sum == sum; ++k) {
      if (std::fabs(x[k]) <= std::numeric_limits<float>::max()) continue;
      const auto code = static_cast<float>(table.code(row, k));
      sum += table.scale(row, format_.group == 0 ? 0 : k / format_.group) * code * x[k];
    }
    return sum;
  }

 private:
  // Adding 1.5 * 2^52 leaves the whole number, to nearest, in the lower bits; calling nearbyint takes longer.
  static int32_t rounded(double value) {
    value += 0x1.8p52;
    int64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<int32_t>(bits);
  }

  const Kernel* kernel_ = nullptr;
  Format format_{};
  int64_t offset_count_ = 0, digit_bytes_ = 0;
  std::vector<int32_t> offsets_;
  std::vector<int8_t> digits_;
  std::vector<float> units_;
  std::vector<char> finite_;
  std::vector<Token> tokens_;
};

constexpr int64_t kBytesPerTask = 1 << 15;  // of a table; less does not pay for waking a thread
constexpr int64_t kTokensPerBlock = 64;     // their digits stay in the second-level cache

// The product for tokens x [tokens, columns].
//   write(token, row, count, sums)           takes the sums of `count` rows from `row` on; each row comes once
//   parallel(count, grain, body(begin, end)) runs body over [0, count) on any number of threads
template <typename Parallel, typename Write>
void multiply_tokens(const Kernel& kernel, const Table& table, const float* x, int64_t tokens, TokenDigits& digits,
                     const Parallel& parallel, const Write& write) {
  const int64_t columns = table.format.columns;
  digits.reserve(kernel, table.format, tokens);
  parallel(tokens, ceil_div(1 << 14, columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) digits.build(t, x + t * columns);
  });
  const int64_t block_bytes = table.format.words() * kRows * 4 * std::max<int64_t>(1, tokens / 4);
  parallel(table.blocks(), ceil_div(kBytesPerTask, block_bytes), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> copy;
    std::vector<float> sums(tokens * kRows);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * kRows, rows = std::min(kRows, table.rows - first);
      kernel.multiply(table.block(index, copy), table.format, digits.tokens(), tokens, sums.data());
      for (int64_t t = 0; t < tokens; ++t) {
        float* y = sums.data() + t * kRows;
        const float unit = digits.unit(t);
        for (int64_t r = 0; r < kRows; ++r) y[r] *= unit;
        if (!digits.finite(t))
          for (int64_t r = 0; r < rows; ++r) y[r] = digits.sum_of_infinite(x + t * columns, table, first + r);
        write(t, first, rows, y);
      }
    }
  });
}

}  // namespace dbf_rows

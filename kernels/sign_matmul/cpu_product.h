// The product with a packed sign matrix on CPUs, for any instruction set.
//
//     y[m, n] = unit[m] * sum over groups g of four columns of table[m, g][four sign bits of row n]
//
// Four neighbouring columns have 16 possible signed sums: a look-up table (LUT), built once per token. Every row of the
// sign matrix then replaces four additions by one look-up and one addition. Its four sign bits are the index (bit 1 = +1,
// least significant bit = first column; layout of dbf_compile/signs.py). Signs meet nothing but look-ups and additions.
//
// Entries are whole numbers in a unit of the token. Sums of whole numbers are exact in any order, so a result depends
// neither on threads nor on tiles nor on the instruction set; and entries can be split into bytes, of which a vector
// register looks up 64 at once. An entry has `bits` bits: 24 (the error of a float32 sum) or 16 (about 1e-4).
//
// cpu_types.h <- cpu_portable.h, cpu_avx.h, cpu_neon.h (both around cpu_bytes.h) <- this file. None includes torch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu_portable.h"
#include "cpu_types.h"
#if defined(__x86_64__)
#include "cpu_avx.h"
#elif defined(__aarch64__)
#include "cpu_neon.h"
#endif

namespace dbf {

// The kernels that this processor runs, fastest first.
inline std::vector<const Kernel*> usable_kernels() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");  // every processor with AVX2 has F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
    kernels.push_back(&kAvx512Vbmi);
  if (avx512) kernels.push_back(&kAvx512);
  if (avx2) kernels.push_back(&kAvx2);
#elif defined(__aarch64__)
  kernels.push_back(&kNeon);
#endif
  kernels.push_back(&kPortable);
  return kernels;
}

// The kernel that $DBF_CPU_ISA names, else the fastest; null if this processor does not run the named one.
inline const Kernel* choose_kernel() {
  static const std::vector<const Kernel*> usable = usable_kernels();
  const char* name = std::getenv("DBF_CPU_ISA");
  if (name == nullptr || *name == 0) return usable.front();
  for (const Kernel* kernel : usable)
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  return nullptr;
}

inline std::string usable_names() {
  std::string names;
  for (const Kernel* kernel : usable_kernels()) names += (names.empty() ? "" : ", ") + std::string(kernel->name);
  return names;
}

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

// A sign matrix in memory, int32 words [rows, words]. Interleaved: every full block of 16 rows holds word 0 of all 16 rows,
// then word 1 of all 16, and so on; the rows of an incomplete last block are stored one by one. Else all rows are.
struct Signs {
  const uint32_t* words;
  int64_t rows, columns, count;
  bool interleaved;

  Signs(const void* data, int64_t rows, int64_t columns, bool interleaved)
      : words(static_cast<const uint32_t*>(data)),
        rows(rows),
        columns(columns),
        count(ceil_div(columns, kWordBits)),
        interleaved(interleaved) {}

  int64_t tiles() const { return ceil_div(rows, kTileRows); }

  uint32_t word(int64_t row, int64_t w) const {
    const int64_t block = row / kRows;
    return interleaved && (block + 1) * kRows <= rows ? words[(block * count + w) * kRows + row % kRows]
                                                      : words[row * count + w];
  }

  // Tile `index`; rows that are not interleaved are copied to `scratch`, of scratch_words() words.
  Tile tile(int64_t index, uint32_t* scratch) const {
    Tile tile{{}, count, kTileRows * count * 4};
    const int64_t last = ceil_div(rows, kRows) - 1;
    for (int64_t b = 0; b < kBlocks; ++b) {
      // Past the end, repeat the last block; nobody reads its result.
      const int64_t block = std::min(index * kBlocks + b, last), first = block * kRows;
      if (interleaved && first + kRows <= rows) {
        tile.words[b] = words + first * count;
        continue;
      }
      uint32_t* to = scratch + b * kRows * count;
      for (int64_t r = 0; r < kRows; ++r) {
        const uint32_t* from = words + std::min(first + r, rows - 1) * count;
        for (int64_t w = 0; w < count; ++w) to[w * kRows + r] = from[w];
      }
      tile.words[b] = to;
    }
    return tile;
  }
  int64_t scratch_words() const { return kTileRows * count; }
};

// The look-up tables of a block of tokens, with the unit of each token and whether it is finite.
class TokenBlock {
 public:
  void reserve(const Kernel& kernel, int64_t tokens, int64_t columns, int bits) {
    kernel_ = &kernel;
    bits_ = bits;
    columns_ = columns;
    words_ = ceil_div(columns, kWordBits);
    stride_ = ceil_div(kernel.table_bytes(words_, bits), 64) * 64;
    tables_ = table_memory_.get(tokens * stride_);
    values_ = value_memory_.get(tokens * words_ * kWordBits);
    units_.resize(tokens);
    finite_.resize(tokens);
  }

  // The activations of a token, to be written before build(token).
  float* values(int64_t token) { return values_ + token * words_ * kWordBits; }

  void build(int64_t token) {
    float* z = values(token);
    const int64_t count = words_ * kWordBits, groups = words_ * kGroupsPerWord;
    std::fill(z + columns_, z + count, 0.0f);  // the columns that pad the last word
    Peaks peaks = kernel_->peaks(z, groups);
    units_[token] = 0.0;
    finite_[token] = peaks.value <= std::numeric_limits<float>::max();
    if (!finite_[token]) return;
    // Sums of very large values, and factors for very small ones, would overflow float32.
    const float range = peaks.value > 0x1p100f ? 0x1p-64f : peaks.value < 0x1p-60f ? 0x1p64f : 1.0f;
    if (range != 1.0f) {
      for (int64_t k = 0; k < count; ++k) z[k] *= range;
      peaks = kernel_->peaks(z, groups);
    }
    float factor = 0.0f;
    if (peaks.group > 0.0f) {
      // With 24 bits a power of two, so that values which are exact in float32 stay exact. 8388000 instead of 2^23 - 1
      // leaves room for the rounding of sums.
      factor = bits_ == 24 ? std::ldexp(1.0f, std::ilogb(8388000.0f / peaks.group)) : 32767.0f / peaks.group;
      units_[token] = 1.0 / (static_cast<double>(factor) * range);
    }
    for (int64_t k = 0; k < count; ++k) z[k] *= factor;
    kernel_->build(z, words_, bits_, tables_ + token * stride_);
  }

  Tables tables(int64_t token) const { return {tables_ + token * stride_, stride_, units_.data() + token}; }

  // The sum as float32 has it if an activation is infinite or NaN; the finite ones do not matter then.
  bool finite(int64_t token) const { return finite_[token]; }
  float sum_of_infinite(int64_t token, const Signs& signs, int64_t row) {
    const float* z = values(token);
    float sum = 0.0f;
    for (int64_t k = 0; k < columns_ && sum == sum; ++k) {
      if (std::fabs(z[k]) <= std::numeric_limits<float>::max()) continue;
      const bool positive = signs.word(row, k / kWordBits) >> (k % kWordBits) & 1;
      sum += positive ? z[k] : -z[k];
    }
    return sum;
  }

 private:
  const Kernel* kernel_ = nullptr;
  int bits_ = 0;
  int64_t columns_ = 0, words_ = 0, stride_ = 0;
  uint8_t* tables_ = nullptr;
  float* values_ = nullptr;
  Scratch<uint8_t> table_memory_;
  Scratch<float> value_memory_;
  std::vector<double> units_;
  std::vector<char> finite_;
};

constexpr int64_t kTableBudget = 1 << 20;   // bytes of tables at a time: half of a common second-level cache
constexpr int64_t kLookUpsPerTask = 1 << 17;  // fewer do not pay for waking a thread

inline int64_t tokens_per_block(const Kernel& kernel, int64_t columns, int bits) {
  const int64_t bytes = kernel.table_bytes(ceil_div(columns, kWordBits), bits);
  return std::clamp<int64_t>(kTableBudget / std::max<int64_t>(bytes, 1), 2, 64) & ~int64_t(1);
}

// One product for a block of tokens.
//   read(token, values)                      writes the `columns` activations of a token to `values`
//   write(token, row, count, sums)           takes the sums of `count` rows from `row` on; each row comes once
//   parallel(count, grain, body(begin, end)) runs body over [0, count) on any number of threads
template <typename Parallel, typename Read, typename Write>
void multiply_block(const Kernel& kernel, const Signs& signs, int bits, int64_t tokens, TokenBlock& block,
                    const Parallel& parallel, const Read& read, const Write& write) {
  block.reserve(kernel, tokens, signs.columns, bits);
  parallel(tokens, ceil_div(kLookUpsPerTask, std::max<int64_t>(signs.columns * 4, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      read(t, block.values(t));
      block.build(t);
    }
  });
  const int64_t work = std::max<int64_t>(kTileRows * signs.count * kGroupsPerWord * tokens, 1);
  parallel(signs.tiles(), ceil_div(kLookUpsPerTask, work), [&](int64_t begin, int64_t end) {
    static thread_local Scratch<uint32_t> copies;
    alignas(64) float sums[kTokensAtOnce * kTileRows];
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = signs.tile(index, copies.get(signs.scratch_words()));
      const int64_t first = index * kTileRows, rows = std::min(kTileRows, signs.rows - first);
      for (int64_t t = 0; t < tokens; t += kTokensAtOnce) {
        const int64_t count = std::min(kTokensAtOnce, tokens - t);
        kernel.multiply(tile, block.tables(t), count, bits, sums);
        for (int64_t i = 0; i < count; ++i) {
          float* y = sums + i * kTileRows;
          if (!block.finite(t + i))
            for (int64_t r = 0; r < rows; ++r) y[r] = block.sum_of_infinite(t + i, signs, first + r);
          write(t + i, first, rows, y);
        }
      }
    }
  });
}

}  // namespace dbf

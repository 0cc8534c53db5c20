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
// cpu_types.h <- cpu_portable.h, cpu_avx.h, cpu_neon.h (both around cpu_bytes.h), cpu_amx.h <- this file, cpu_team.h. None
// includes torch.

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
#include "cpu_team.h"
#include "cpu_types.h"
#if defined(__x86_64__)
#include "cpu_amx.h"
#include "cpu_avx.h"
#elif defined(__aarch64__)
#include "cpu_neon.h"
#endif

namespace dbf {

// The kernels that this processor runs, fastest first where there are tokens enough.
inline std::vector<const Kernel*> usable_kernels() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");  // every processor with AVX2 has F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vbmi = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  if (vbmi && has_amx()) kernels.push_back(&kAmx);
  if (vbmi) kernels.push_back(&kAvx512Vbmi);
  if (avx512) kernels.push_back(&kAvx512);
  if (avx2) kernels.push_back(&kAvx2);
#elif defined(__aarch64__)
  kernels.push_back(&kNeon);
#endif
  kernels.push_back(&kPortable);
  return kernels;
}

// The kernel that $DBF_CPU_ISA names, else the fastest; null if this processor does not run the named one.
inline const Kernel* choose_kernel(int64_t tokens) {
  static const std::vector<const Kernel*> usable = usable_kernels();
  const char* name = std::getenv("DBF_CPU_ISA");
  if (name == nullptr || *name == 0)
    return *std::find_if(usable.begin(), usable.end(), [=](const Kernel* one) { return tokens >= one->least_tokens; });
  for (const Kernel* kernel : usable)
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  return nullptr;
}

inline std::string usable_names() {
  std::string names;
  for (const Kernel* kernel : usable_kernels()) names += (names.empty() ? "" : ", ") + std::string(kernel->name);
  return names;
}

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
    if (static_cast<int64_t>(units_.size()) < tokens) units_.resize(tokens);
    if (static_cast<int64_t>(infinite_.size()) < tokens) infinite_.resize(tokens);
  }
  int64_t words() const { return words_; }

  // Builds the tables of the words [begin, end) of a token. `z` has its activations, and room for whole words; it is changed.
  // Threads may build parts of one token, each from a copy of its own.
  void build(int64_t token, float* z, int64_t begin, int64_t end) {
    const int64_t count = words_ * kWordBits, groups = words_ * kGroupsPerWord;
    std::fill(z + columns_, z + count, 0.0f);  // the columns that pad the last word
    Peaks peaks = kernel_->peaks(z, groups);
    const bool finite = peaks.value <= std::numeric_limits<float>::max();
    if (begin == 0) {
      units_[token] = 0.0;
      infinite_[token].clear();
      if (!finite) infinite_[token].assign(z, z + columns_);
    }
    if (!finite) return;
    // Sums of very large values, and factors for very small ones, would overflow float32.
    const float range = peaks.value > 0x1p100f ? 0x1p-64f : peaks.value < 0x1p-60f ? 0x1p64f : 1.0f;
    if (range != 1.0f) {
      for (int64_t k = 0; k < count; ++k) z[k] *= range;
      peaks = kernel_->peaks(z, groups);
    }
    float factor = 0.0f;
    if (peaks.group > 0.0f) {
      // With 24 bits a power of two, so that values which are exact in float32 stay exact. Both numbers leave room for the
      // rounding of values, four of them by 2 at most, and for signed bytes: 127 * (1 + 256 + 256^2) is the largest.
      factor = bits_ == 24 ? std::ldexp(1.0f, std::ilogb(8355000.0f / peaks.group)) : 32630.0f / peaks.group;
      if (begin == 0) units_[token] = 1.0 / (static_cast<double>(factor) * range);
    }
    float* part = z + begin * kWordBits;
    const int64_t size = (end - begin) * kWordBits;
    for (int64_t k = 0; k < size; ++k) {  // to nearest; compilers have instructions for this, not for std::round
      const float value = part[k] * factor;
      part[k] = static_cast<float>(static_cast<int32_t>(value + std::copysign(0.5f, value)));
    }
    kernel_->build(part, begin, end, words_, bits_, tables_ + token * stride_);
  }

  Tables tables(int64_t token) const { return {tables_ + token * stride_, stride_, units_.data() + token}; }

  // The sum as float32 has it if an activation is infinite or NaN; the finite ones do not matter then.
  bool finite(int64_t token) const { return infinite_[token].empty(); }
  float sum_of_infinite(int64_t token, const Signs& signs, int64_t row) const {
    const float* z = infinite_[token].data();
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
  Scratch<uint8_t> table_memory_;
  std::vector<double> units_;
  std::vector<std::vector<float>> infinite_;  // the activations of tokens that are not finite
};

constexpr int64_t kTableBudget = 1 << 20;   // bytes of tables at a time: half of a common second-level cache
constexpr int64_t kLookUpsPerTask = 1 << 16;  // fewer do not pay for waking a thread
constexpr int64_t kWordsPerPart = 16;         // of a token whose tables several threads build
constexpr int64_t kRangesPerThread = 4;       // of tiles, so that a thread that comes late has less to do
constexpr int64_t kTilesPerRange = 16;

inline int64_t tokens_per_block(const Kernel& kernel, int64_t columns, int bits) {
  const int64_t bytes = kernel.table_bytes(ceil_div(columns, kWordBits), bits);
  return std::clamp<int64_t>(kTableBudget / std::max<int64_t>(bytes, 1), 2, kMostAtOnce) & ~int64_t(1);
}

// Products of one block of tokens that need nothing of each other: several sign matrices, each with activations of its own.
//   read(product, token, values)              writes the activations of a token to `values`
//   write(product, token, row, count, sums)   takes the sums of `count` rows from `row` on; each row comes once
template <typename Read, typename Write>
class Level {
 public:
  Level(const Kernel& kernel, int bits, int64_t tokens, const std::vector<Signs>& signs, TokenBlock* blocks,
        int64_t threads, Read read, Write write)
      : kernel_(kernel), bits_(bits), tokens_(tokens), signs_(signs), blocks_(blocks), read_(read), write_(write) {
    int64_t words = 1;
    for (size_t i = 0; i < signs.size(); ++i) {
      blocks[i].reserve(kernel, tokens, signs[i].columns, bits);
      tiles_ += signs[i].tiles();
      words = std::max(words, blocks[i].words());
    }
    parts_ = std::clamp<int64_t>(words / kWordsPerPart, 1, ceil_div(threads, tokens * count()));
    // Every range that a thread takes costs the others a look at the counter.
    const int64_t shares = std::clamp<int64_t>(tiles_ * tokens / (threads * kTilesPerRange), 1, kRangesPerThread);
    ranges_ = std::min(tiles_, threads * shares);
  }

  void work(Team& team, int step) {
    team.share(2 * step, count() * tokens_ * parts_, [&](int64_t item) { build(item); });
    team.share(2 * step + 1, ranges_, [&](int64_t range) { multiply(range); });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(signs_.size()); }

  void build(int64_t item) {
    static thread_local Scratch<float> memory;
    const int64_t part = item % parts_, token = item / parts_ % tokens_, product = item / parts_ / tokens_;
    TokenBlock& block = blocks_[product];
    const int64_t words = block.words(), begin = words * part / parts_, end = words * (part + 1) / parts_;
    float* z = memory.get(words * kWordBits);
    read_(product, token, z);
    if (begin < end || part == 0) block.build(token, z, begin, end);
  }

  void multiply(int64_t range) {
    static thread_local Scratch<uint32_t> copies;
    alignas(64) float sums[kMostAtOnce * kTileRows];
    int64_t index = tiles_ * range / ranges_, product = 0;
    const int64_t last = tiles_ * (range + 1) / ranges_;
    int64_t before = 0;  // tiles of the products before
    for (; index < last; ++index) {
      while (index - before >= signs_[product].tiles()) before += signs_[product++].tiles();
      const Signs& signs = signs_[product];
      const TokenBlock& block = blocks_[product];
      const int64_t first = (index - before) * kTileRows, rows = std::min(kTileRows, signs.rows - first);
      const Tile tile = signs.tile(index - before, copies.get(signs.scratch_words()));
      for (int64_t t = 0; t < tokens_; t += kernel_.tokens_at_once) {
        const int64_t at_once = std::min(kernel_.tokens_at_once, tokens_ - t);
        kernel_.multiply(tile, block.tables(t), at_once, bits_, sums);
        for (int64_t i = 0; i < at_once; ++i) {
          float* y = sums + i * kTileRows;
          if (!block.finite(t + i))
            for (int64_t r = 0; r < rows; ++r) y[r] = block.sum_of_infinite(t + i, signs, first + r);
          write_(product, t + i, first, rows, y);
        }
      }
    }
  }

  const Kernel& kernel_;
  const int bits_;
  const int64_t tokens_;
  const std::vector<Signs>& signs_;
  TokenBlock* blocks_;
  Read read_;
  Write write_;
  int64_t tiles_ = 0, parts_ = 1, ranges_ = 1;
};

// How many threads pay for products of a block of tokens.
inline int64_t threads_for(const std::vector<Signs>& signs, int64_t tokens, int64_t most) {
  int64_t look_ups = 0;
  for (const Signs& matrix : signs) look_ups += matrix.rows * matrix.count * kGroupsPerWord * tokens;
  return std::clamp<int64_t>(look_ups / kLookUpsPerTask, 1, most);
}

// Runs levels one after the other, each with all threads. parallel(count, grain, body(begin, end)) runs body on up to `count`
// threads.
template <typename Parallel, typename... Levels>
void run_levels(int64_t threads, const Parallel& parallel, Levels&... levels) {
  Team team;
  const auto work = [&] {
    int step = 0;
    (levels.work(team, step++), ...);
  };
  if (threads == 1) return work();
  parallel(threads, 1, [&](int64_t, int64_t) { work(); });
}

// One product for a block of tokens.
template <typename Parallel, typename Read, typename Write>
void multiply_block(const Kernel& kernel, const Signs& signs, int bits, int64_t tokens, TokenBlock& block, int64_t most,
                    const Parallel& parallel, const Read& read, const Write& write) {
  const std::vector<Signs> matrices{signs};
  const int64_t threads = threads_for(matrices, tokens, most);
  const auto read_one = [&](int64_t, int64_t t, float* values) { read(t, values); };
  const auto write_one = [&](int64_t, int64_t t, int64_t row, int64_t count, float* sums) { write(t, row, count, sums); };
  Level level(kernel, bits, tokens, matrices, &block, threads, read_one, write_one);
  run_levels(threads, parallel, level);
}

}  // namespace dbf

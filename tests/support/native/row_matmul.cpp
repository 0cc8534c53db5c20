// The product with a table of quantized rows, without torch: against sums in double precision, and all instruction sets
// against each other bit for bit. See check.h.

#include "check.h"
#include "cpu_product.h"

namespace {

using check::Memory;
using check::Random;

struct Problem {
  dbf_rows::Format format;
  int64_t rows, tokens;
  std::vector<int32_t> codes;  // [rows, columns]
  std::vector<float> scales;   // [rows, groups]
  Memory<uint32_t> words;
  Memory<float> x;
};

// The words of one row, written one code at a time, as dbf_compile/rows.py defines them. Codes behind the last column are
// random: they must not count.
void pack(const dbf_rows::Format& format, const int32_t* codes, const float* scales, Random& random, uint32_t* words) {
  for (int64_t w = 0; w < format.scale_words(); ++w) words[w] = 0;
  for (int64_t g = 0; g < format.groups(); ++g) {
    uint32_t bits;
    std::memcpy(&bits, scales + g, 4);
    words[format.group == 0 ? 0 : g / 2] |= format.group == 0 || g % 2 == 1 ? bits : bits >> 16;
  }
  uint32_t* unit = words + format.scale_words();
  for (int64_t w = 0; w < format.units() * format.unit_words(); ++w) unit[w] = 0;
  for (int64_t k = 0; k < format.steps() * 4; ++k) {
    const int64_t in_unit = k % (format.unit_steps() * 4), step = in_unit / 4, shift = 8 * (k % 4);
    uint32_t* own = unit + k / (format.unit_steps() * 4) * format.unit_words();
    const uint32_t code = k < format.columns ? codes[k] + (1 << (format.bits - 1)) : random() % (1 << format.bits);
    if (format.bits == 8) own[0] |= code << shift;
    if (format.bits < 8) own[step / 2] |= (code & 15) << (shift + step % 2 * 4);
    if (format.bits == 6) own[2] |= (code >> 4) << (shift + 2 * step);
  }
}

Problem make(Random& random) {
  const int64_t bits = std::vector<int64_t>{8, 6, 4}[random() % 3], unit = bits == 8 ? 4 : bits == 6 ? 16 : 8;
  dbf_rows::Format format{bits, check::random_size(random, 12), 0};
  if (random() % 3 != 0) format.group = unit * check::random_size(random, 4);
  int64_t rows = check::random_size(random, 8), tokens = check::random_size(random, 7.5);
  while (rows * tokens * format.columns > 1 << 20) (rows > tokens ? rows : tokens) /= 2;
  Problem problem{format, rows, tokens, {}, {}, Memory<uint32_t>(rows * format.words()),
                  Memory<float>(tokens * format.columns)};
  const int32_t zero = 1 << (bits - 1);
  for (int64_t i = 0; i < rows * format.columns; ++i)
    problem.codes.push_back(random() % 64 == 0 ? -zero : static_cast<int32_t>(random() % (2 * zero)) - zero);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows * format.groups(); ++i) {
    float scale = normal(random) * std::pow(10.0f, 3 * normal(random));
    uint32_t word;
    std::memcpy(&word, &scale, 4);
    if (format.group != 0) word &= 0xFFFF0000;
    std::memcpy(&scale, &word, 4);
    problem.scales.push_back(random() % 64 == 0 ? 0.0f : scale);
  }
  const int64_t count = format.words(), full = rows / dbf_rows::kRows * dbf_rows::kRows;
  std::vector<uint32_t> row_words(count);
  for (int64_t row = 0; row < rows; ++row) {
    pack(format, &problem.codes[row * format.columns], &problem.scales[row * format.groups()], random, row_words.data());
    for (int64_t w = 0; w < count; ++w)
      problem.words[row < full ? (row / dbf_rows::kRows * count + w) * dbf_rows::kRows + row % dbf_rows::kRows
                               : row * count + w] = row_words[w];
  }
  const check::Numbers numbers = check::Numbers::of(random);
  for (int64_t t = 0; t < tokens; ++t) numbers.fill(random, problem.x.data() + t * format.columns, format.columns);
  return problem;
}

Memory<float> run(const dbf_rows::Kernel& kernel, const Problem& problem, int64_t threads) {
  const dbf_rows::Table table{problem.words.data(), problem.rows, problem.format};
  Memory<float> y(problem.tokens * problem.rows);
  dbf_rows::TokenDigits digits;
  for (int64_t first = 0; first < problem.tokens; first += dbf_rows::kTokensPerBlock)
    dbf_rows::multiply_tokens(kernel, table, problem.x.data() + first * problem.format.columns,
                              std::min(dbf_rows::kTokensPerBlock, problem.tokens - first), digits,
                              check::Threads{threads}, [&](int64_t t, int64_t row, int64_t count, const float* sums) {
                                std::copy_n(sums, count, y.data() + (first + t) * problem.rows + row);
                              });
  return y;
}

bool right(const Problem& problem, const Memory<float>& y) {
  const dbf_rows::Format& format = problem.format;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    const float* x = problem.x.data() + t * format.columns;
    double peak = 0.0;
    bool finite = true;
    for (int64_t k = 0; k < format.columns; ++k) peak = std::max<double>(peak, std::fabs(x[k]));
    for (int64_t k = 0; k < format.columns; ++k) finite = finite && std::isfinite(x[k]);
    for (int64_t row = 0; row < problem.rows; ++row) {
      double truth = 0.0, size = 0.0;
      for (int64_t k = 0; k < format.columns; ++k) {
        const float scale = problem.scales[row * format.groups() + (format.group == 0 ? 0 : k / format.group)];
        const double weight = static_cast<double>(scale) * problem.codes[row * format.columns + k];
        truth += weight * x[k];
        size += std::fabs(weight);
      }
      // Of an activation, in units of the largest; then of a float32 sum over groups.
      const double tolerance = finite ? size * peak * (0x1p-21 + format.groups() * 0x1p-23) : 0.0;
      const float result = y[t * problem.rows + row];
      if (check::near(result, truth, tolerance)) continue;
      std::printf("  row %lld of token %lld: %g instead of %g\n", static_cast<long long>(row), static_cast<long long>(t),
                  result, truth);
      return false;
    }
  }
  return true;
}

void check_shape(Random& random, check::Counts& counts) {
  const Problem problem = make(random);
  const int64_t threads = 1 + random() % 3;
  const Memory<float> same = run(dbf_rows::portable_kernel(), problem, 1);
  for (const dbf_rows::Choice& choice : dbf_rows::usable_kernels()) {
    const Memory<float> y = run(*choice.kernel, problem, threads);
    const bool good = right(problem, y) && y == same;
    if (!good)
      std::printf("  wrong: %lld x %lld, %lld bits, groups of %lld, %lld tokens, %lld threads\n",
                  static_cast<long long>(problem.rows), static_cast<long long>(problem.format.columns),
                  static_cast<long long>(problem.format.bits), static_cast<long long>(problem.format.group),
                  static_cast<long long>(problem.tokens), static_cast<long long>(threads));
    counts[choice.name].first += !good;
    ++counts[choice.name].second;
  }
}

}  // namespace

int main(int count, char** arguments) { return check::run(count, arguments, check_shape); }

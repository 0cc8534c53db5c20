// The product with packed signs, without torch: against sums in double precision, and all instruction sets against each other
// bit for bit. A team of one to three threads does several products, and then products of their results. See check.h.

#include "check.h"
#include "cpu_product.h"

namespace {

using check::Memory;
using check::Random;

struct Matrix {
  int64_t rows, columns;
  std::vector<uint32_t> plain;  // row after row
  Memory<uint32_t> words;       // as the kernel reads them

  int64_t count() const { return dbf::ceil_div(columns, dbf::kWordBits); }
  double sign(int64_t row, int64_t k) const { return plain[row * count() + k / 32] >> (k % 32) & 1 ? 1.0 : -1.0; }
};

struct Problem {
  int64_t tokens;
  int bits;
  bool interleaved;
  std::vector<Matrix> inner, outer;  // of layers with one input; without outer ones there is one level of products
  Memory<float> x;
};

Matrix random_matrix(Random& random, int64_t rows, int64_t columns, bool interleaved) {
  const int64_t count = dbf::ceil_div(columns, dbf::kWordBits);
  Matrix matrix{rows, columns, std::vector<uint32_t>(rows * count), Memory<uint32_t>(rows * count)};
  for (auto& word : matrix.plain) word = random();  // bits behind the last column must not count
  const int64_t full = interleaved ? rows / dbf::kRows * dbf::kRows : 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t w = 0; w < count; ++w)
      matrix.words[row < full ? (row / dbf::kRows * count + w) * dbf::kRows + row % dbf::kRows : row * count + w] =
          matrix.plain[row * count + w];
  return matrix;
}

Problem make(Random& random) {
  const int64_t columns = check::random_size(random, 13), layers = check::random_size(random, 2);
  int64_t rows = check::random_size(random, 10), tokens = check::random_size(random, 6);
  while (rows * columns * tokens * layers > 1 << 20 && rows * tokens > 1) {
    int64_t& larger = tokens > 8 ? tokens : rows > 1 ? rows : tokens;
    larger = (larger + 1) / 2;
  }
  Problem problem{tokens, random() % 2 == 0 ? 24 : 16, random() % 2 == 0, {}, {}, Memory<float>(tokens * columns)};
  const bool has_outer = random() % 2 == 0;
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t own = i == 0 ? rows : check::random_size(random, std::log2(static_cast<double>(rows)));
    problem.inner.push_back(random_matrix(random, own, columns, problem.interleaved));
    if (has_outer)
      problem.outer.push_back(random_matrix(random, check::random_size(random, 7), own, problem.interleaved));
  }
  const check::Numbers numbers = check::Numbers::of(random);
  for (int64_t t = 0; t < tokens; ++t) numbers.fill(random, problem.x.data() + t * columns, columns);
  return problem;
}

std::vector<dbf::Signs> signs_of(const std::vector<Matrix>& matrices, bool interleaved) {
  std::vector<dbf::Signs> signs;
  for (const Matrix& matrix : matrices) signs.emplace_back(matrix.words.data(), matrix.rows, matrix.columns, interleaved);
  return signs;
}

// The results of each product, first those of the inner matrices.
std::vector<Memory<float>> run(const dbf::Kernel& kernel, const Problem& problem, int64_t threads) {
  const size_t layers = problem.inner.size();
  std::vector<Memory<float>> results;
  for (const auto* matrices : {&problem.inner, &problem.outer})
    for (const Matrix& matrix : *matrices) results.emplace_back(problem.tokens * matrix.rows);
  const std::vector<dbf::Signs> inner = signs_of(problem.inner, problem.interleaved);
  const std::vector<dbf::Signs> outer = signs_of(problem.outer, problem.interleaved);
  std::vector<dbf::TokenBlock> first(layers), second(layers);
  const auto copy = [](const float* from, int64_t token, int64_t count, float* to) {
    std::copy_n(from + token * count, count, to);
  };
  dbf::Level one(
      kernel, problem.bits, problem.tokens, inner, first.data(), threads,
      [&](int64_t, int64_t t, float* values) { copy(problem.x.data(), t, problem.inner[0].columns, values); },
      [&](int64_t i, int64_t t, int64_t row, int64_t count, const float* sums) {
        std::copy_n(sums, count, results[i].data() + t * problem.inner[i].rows + row);
      });
  if (outer.empty()) {
    dbf::run_levels(threads, check::Threads{threads}, one);
    return results;
  }
  dbf::Level two(
      kernel, problem.bits, problem.tokens, outer, second.data(), threads,
      [&](int64_t i, int64_t t, float* values) { copy(results[i].data(), t, problem.inner[i].rows, values); },
      [&](int64_t i, int64_t t, int64_t row, int64_t count, const float* sums) {
        std::copy_n(sums, count, results[layers + i].data() + t * problem.outer[i].rows + row);
      });
  dbf::run_levels(threads, check::Threads{threads}, one, two);
  return results;
}

// One product by the function that chooses how many threads it pays for.
Memory<float> run_alone(const dbf::Kernel& kernel, const Problem& problem, int64_t threads) {
  const Matrix& matrix = problem.inner[0];
  Memory<float> y(problem.tokens * matrix.rows);
  dbf::TokenBlock block;
  dbf::multiply_block(
      kernel, signs_of(problem.inner, problem.interleaved)[0], problem.bits, problem.tokens, block, threads,
      check::Threads{threads},
      [&](int64_t t, float* values) { std::copy_n(problem.x.data() + t * matrix.columns, matrix.columns, values); },
      [&](int64_t t, int64_t row, int64_t count, const float* sums) {
        std::copy_n(sums, count, y.data() + t * matrix.rows + row);
      });
  return y;
}

bool right(const Matrix& matrix, int bits, int64_t tokens, const float* x, const float* y) {
  const int64_t groups = dbf::ceil_div(matrix.columns, dbf::kGroup);
  for (int64_t t = 0; t < tokens; ++t, x += matrix.columns, y += matrix.rows) {
    double peak = 0.0;
    bool finite = true;
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0.0;
      for (int64_t k = g * dbf::kGroup; k < std::min(matrix.columns, (g + 1) * dbf::kGroup); ++k) sum += std::fabs(x[k]);
      peak = std::max(peak, sum);
      finite = finite && std::isfinite(sum);
    }
    for (int64_t row = 0; row < matrix.rows; ++row) {
      double truth = 0.0;
      for (int64_t k = 0; k < matrix.columns; ++k) truth += matrix.sign(row, k) * x[k];
      // Of an entry, in units of the largest group: each of four values is rounded by half of its last place.
      const double rounding = bits == 24 ? 0x1.1p-21 : 0x1.1p-14;
      if (check::near(y[row], truth, finite ? groups * rounding * peak : 0.0)) continue;
      std::printf("  row %lld of token %lld: %g instead of %g\n", static_cast<long long>(row), static_cast<long long>(t),
                  y[row], truth);
      return false;
    }
  }
  return true;
}

// Of 16-bit numbers from any one on: all instruction sets round alike, and write no more than they are asked to.
bool halves_agree(const dbf::Kernel& kernel, uint16_t first, int64_t count) {
  Memory<uint16_t> halves(count), back(count), same_back(count);
  Memory<float> wide(count), same(count);
  for (int64_t i = 0; i < count; ++i) halves[i] = static_cast<uint16_t>(first + 257 * i);
  kernel.half_to_float(halves.data(), count, wide.data());
  dbf::portable_half_to_float(halves.data(), count, same.data());
  for (int64_t i = 0; i < count; ++i)
    if (!(wide[i] == same[i] || (std::isnan(wide[i]) && std::isnan(same[i])))) return false;
  for (int64_t i = 0; i < count; ++i)  // between two numbers, or halfway
    if (std::isfinite(wide[i])) wide[i] *= 1.0f + static_cast<float>(first % 5) * 0x1p-12f;
  kernel.float_to_half(wide.data(), count, back.data());
  dbf::portable_float_to_half(wide.data(), count, same_back.data());
  for (int64_t i = 0; i < count; ++i)
    if (!std::isnan(wide[i]) && back[i] != same_back[i]) return false;
  return true;
}

void check_shape(Random& random, check::Counts& counts) {
  const Problem problem = make(random);
  const int64_t threads = 1 + random() % 3, halves = check::random_size(random, 8);
  const uint16_t first = static_cast<uint16_t>(random());
  const std::vector<Memory<float>> same = run(dbf::kPortable, problem, 1);
  for (const dbf::Kernel* kernel : dbf::usable_kernels()) {
    const std::vector<Memory<float>> results = run(*kernel, problem, threads);
    bool good = results == same && run_alone(*kernel, problem, threads) == same[0] && halves_agree(*kernel, first, halves);
    for (size_t i = 0; i < problem.inner.size(); ++i) {
      good = good && right(problem.inner[i], problem.bits, problem.tokens, problem.x.data(), results[i].data());
      if (!problem.outer.empty())
        good = good && right(problem.outer[i], problem.bits, problem.tokens, results[i].data(),
                             results[problem.inner.size() + i].data());
    }
    if (!good)
      std::printf("  wrong: %zu layers, %lld x %lld, then %zu, %lld tokens, interleaved %d, %d bits, %lld threads\n",
                  problem.inner.size(), static_cast<long long>(problem.inner[0].rows),
                  static_cast<long long>(problem.inner[0].columns), problem.outer.size(),
                  static_cast<long long>(problem.tokens), problem.interleaved, problem.bits,
                  static_cast<long long>(threads));
    counts[kernel->name].first += !good;
    ++counts[kernel->name].second;
  }
}

}  // namespace

int main(int count, char** arguments) { return check::run(count, arguments, check_shape); }

// The CPU kernels without torch: against sums in double precision, and against each other bit for bit.
// Prints a line for each kernel and exits with 1 where one is wrong. Built for other processors and with sanitizers.
//
//   check                  a table of shapes
//   check <seed> <seconds> random shapes for so long, in time of the processor: others may hold it

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <random>
#include <string>
#include <tuple>

#include "cpu_product.h"

namespace {

struct Case {
  int64_t rows, columns, tokens;
  bool interleaved;
  int bits;
  float spread;  // decades between activations
};

struct Problem {
  std::vector<uint32_t> plain, words;
  std::vector<float> x;
};

Problem make(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.rows * 7919 + c.columns * 31 + c.tokens));
  std::normal_distribution<float> normal;
  const int64_t count = dbf::ceil_div(c.columns, dbf::kWordBits);
  Problem problem;
  problem.plain.resize(c.rows * count);
  for (auto& word : problem.plain) word = random();  // bits behind the last column must not count
  problem.words = problem.plain;
  if (c.interleaved)
    for (int64_t row = 0; row < c.rows / dbf::kRows * dbf::kRows; ++row)
      for (int64_t w = 0; w < count; ++w)
        problem.words[(row / dbf::kRows * count + w) * dbf::kRows + row % dbf::kRows] = problem.plain[row * count + w];
  problem.x.resize(c.tokens * c.columns);
  for (auto& value : problem.x) value = normal(random) * std::pow(10.0f, c.spread * normal(random));
  return problem;
}

// Threads take parts of a loop: here one after the other, in parts of `part`.
std::vector<float> run(const dbf::Kernel& kernel, const Case& c, const Problem& problem, int64_t part = INT64_MAX) {
  std::vector<float> y(c.tokens * c.rows, NAN);
  const dbf::Signs signs(problem.words.data(), c.rows, c.columns, c.interleaved);
  const auto in_parts = [part](int64_t count, int64_t, const auto& body) {
    for (int64_t begin = 0; begin < count; begin += std::min(part, count - begin))
      body(begin, begin + std::min(part, count - begin));
  };
  dbf::TokenBlock block;
  dbf::multiply_block(
      kernel, signs, c.bits, c.tokens, block, part == INT64_MAX ? 1 : 4, in_parts,
      [&](int64_t t, float* values) { std::copy_n(problem.x.data() + t * c.columns, c.columns, values); },
      [&](int64_t t, int64_t row, int64_t count, const float* sums) {
        std::copy_n(sums, count, y.data() + t * c.rows + row);
      });
  return y;
}

bool right(const Case& c, const Problem& problem, const std::vector<float>& y) {
  const int64_t count = dbf::ceil_div(c.columns, dbf::kWordBits), groups = dbf::ceil_div(c.columns, dbf::kGroup);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const float* x = problem.x.data() + t * c.columns;
    double peak = 0.0;
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0.0;
      for (int64_t k = g * dbf::kGroup; k < std::min(c.columns, (g + 1) * dbf::kGroup); ++k) sum += std::fabs(x[k]);
      peak = std::max(peak, sum);
    }
    for (int64_t row = 0; row < c.rows; ++row) {
      double truth = 0.0;
      for (int64_t k = 0; k < c.columns; ++k)
        truth += problem.plain[row * count + k / 32] >> (k % 32) & 1 ? x[k] : -x[k];
      const double rounding = c.bits == 24 ? 0x1.8p-22 : 0x1.1p-15;  // of an entry, in units of the largest group
      if (!(std::fabs(y[t * c.rows + row] - truth) <= groups * rounding * peak + 0x1p-23 * std::fabs(truth))) {
        std::printf("  row %lld of token %lld: %g instead of %g\n", static_cast<long long>(row),
                    static_cast<long long>(t), y[t * c.rows + row], truth);
        return false;
      }
    }
  }
  return true;
}

bool halves_agree(const dbf::Kernel& kernel) {
  std::vector<uint16_t> all(1 << 16), back(1 << 16), expected(1 << 16);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(1 << 16), wanted(1 << 16);
  kernel.half_to_float(all.data(), 1 << 16, wide.data());
  dbf::portable_half_to_float(all.data(), 1 << 16, wanted.data());
  for (size_t i = 0; i < all.size(); ++i)
    if (!(wide[i] == wanted[i] || (wide[i] != wide[i] && wanted[i] != wanted[i]))) return false;
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (auto& value : wide) value = normal(random) * std::pow(10.0f, 3 * normal(random));
  kernel.float_to_half(wide.data(), 1 << 16, back.data());
  dbf::portable_float_to_half(wide.data(), 1 << 16, expected.data());
  return back == expected;
}

bool agrees(const dbf::Kernel& kernel, const Case& c, const Problem& problem, int64_t part = INT64_MAX) {
  const std::vector<float> y = run(kernel, c, problem, part), same = run(dbf::kPortable, c, problem);
  if (right(c, problem, y) && std::memcmp(y.data(), same.data(), y.size() * 4) == 0) return true;
  std::printf("  wrong: %lld x %lld, %lld tokens, interleaved %d, %d bits, parts of %lld\n",
              static_cast<long long>(c.rows), static_cast<long long>(c.columns), static_cast<long long>(c.tokens),
              c.interleaved, c.bits, static_cast<long long>(part));
  return false;
}

// Small sizes are as likely as large ones; a product has at most 2^21 terms.
Case random_case(std::mt19937& random) {
  const auto size = [&random](int bits) {
    return 1 + static_cast<int64_t>(std::exp2(std::uniform_real_distribution<double>(0.0, bits)(random)));
  };
  Case c{size(10), size(13), size(6), random() % 2 == 0, random() % 2 == 0 ? 24 : 16, 0.0f};
  c.spread = static_cast<float>(random() % 3) * 2.0f;
  while (c.rows * c.columns * c.tokens > 1 << 21) {
    int64_t& largest = c.tokens > 8 ? c.tokens : c.rows > c.columns ? c.rows : c.columns;
    largest = (largest + 1) / 2;
  }
  return c;
}

int check_random(unsigned seed, double seconds) {
  std::mt19937 random(seed);
  std::map<std::string, std::pair<int64_t, int64_t>> counts;  // wrong, all
  bool good = true;
  while (static_cast<double>(std::clock()) / CLOCKS_PER_SEC < seconds) {
    const Case c = random_case(random);
    const Problem problem = make(c);
    const int64_t part = 1 + random() % 9;
    for (const dbf::Kernel* kernel : dbf::usable_kernels()) {
      auto& [wrong, all] = counts[kernel->name];
      wrong += !agrees(*kernel, c, problem, part);
      ++all;
      good &= wrong == 0;
    }
  }
  for (const auto& [name, count] : counts)
    std::printf("%s: %lld of %lld random shapes wrong\n", name.c_str(), static_cast<long long>(count.first),
                static_cast<long long>(count.second));
  return good ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3) return check_random(std::strtoul(arguments[1], nullptr, 10), std::strtod(arguments[2], nullptr));
  std::vector<Case> cases;
  for (const bool interleaved : {false, true})
    for (const int bits : {24, 16})
      for (const auto& [rows, columns, tokens] : {std::tuple<int, int, int>{1, 1, 1}, {3, 31, 2}, {16, 32, 1},
                                                  {17, 33, 3}, {64, 128, 5}, {67, 129, 9}, {131, 67, 1},
                                                  {48, 5003, 2}, {200, 257, 17}})
        for (const float spread : {0.0f, 4.0f}) cases.push_back({rows, columns, tokens, interleaved, bits, spread});
  bool good = true;
  for (const dbf::Kernel* kernel : dbf::usable_kernels()) {
    int64_t wrong = halves_agree(*kernel) ? 0 : 1;
    for (const Case& c : cases) wrong += !agrees(*kernel, c, make(c));
    std::printf("%s: %lld of %zu cases wrong\n", kernel->name, static_cast<long long>(wrong), cases.size());
    good &= wrong == 0;
  }
  return good ? 0 : 1;
}

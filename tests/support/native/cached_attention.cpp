// Attention over a cache, without torch: against double precision, and all instruction sets against each other bit for bit.
// See check.h.

#include "check.h"
#include "cpu_product.h"

namespace {

using check::Memory;
using check::Random;
using dbf_attention::BFloat16;
using dbf_attention::Float16;
using dbf_attention::Sizes;

template <typename T>
struct Problem {
  Sizes sizes;
  Memory<T> q, keys, values;
  Memory<int64_t> positions;
};

// Of a result: half of its last place, and half of the least number.
template <typename T>
constexpr double kRelative = std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, BFloat16> ? 0x1p-8 : 0x1p-11;
template <typename T>
constexpr double kAbsolute = std::is_same_v<T, Float16> ? 0x1p-25 : 0x1p-133;

Sizes random_sizes(Random& random) {
  const auto size = [&random](double bits) { return check::random_size(random, bits); };
  Sizes sizes{size(2.5), 0, size(2.5), size(6), size(8), size(8), size(10.5), 0, 0.0f, 0.0f};
  const auto products = [&] {
    return sizes.batch * sizes.heads * sizes.tokens * (sizes.key_features + sizes.value_features) * sizes.length;
  };
  for (sizes.heads = sizes.key_heads * size(3); products() > 1 << 20;) {
    int64_t* const all[] = {&sizes.tokens, &sizes.key_features, &sizes.value_features, &sizes.length, &sizes.batch};
    int64_t& one = *all[random() % 5];
    one = check::ceil_div(one, 2);
  }
  if (random() % 2 == 0) sizes.window = size(8);
  if (random() % 3 == 0) sizes.cap = random() % 2 == 0 ? 30.0f : 0.5f;
  sizes.scale = random() % 4 == 0 ? 1.0f : 1.0f / std::sqrt(static_cast<float>(sizes.key_features));
  return sizes;
}

bool reads(const Sizes& sizes, int64_t position, int64_t key) {
  return key <= position && (sizes.window == 0 || key > position - sizes.window);
}

// Positions at both ends of the cache, in order, or anywhere. Keys and values that no query reads stay NaN.
template <typename T>
Problem<T> make(Random& random) {
  const Sizes sizes = random_sizes(random);
  const int64_t B = sizes.batch, L = sizes.length, D = sizes.key_features, V = sizes.value_features;
  Problem<T> problem{sizes, Memory<T>(B * sizes.heads * sizes.tokens * D), Memory<T>(B * sizes.key_heads * D * L),
                     Memory<T>(B * sizes.key_heads * L * V), Memory<int64_t>(B * sizes.tokens)};
  const int order = random() % 4;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t first = check::random_up_to(random, std::max<int64_t>(0, L - sizes.tokens));
    for (int64_t t = 0; t < sizes.tokens; ++t) {
      const int64_t anywhere[] = {std::min(first + t, L - 1), 0, L - 1, check::random_up_to(random, L - 1)};
      problem.positions[b * sizes.tokens + t] = anywhere[order == 0 ? 0 : random() % 4];
    }
  }
  std::normal_distribution<float> normal;
  const auto fill = [&](T& value) { dbf_attention::narrow(normal(random), &value); };
  for (T& value : problem.q) fill(value);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < L; ++k) {
      bool is_read = false;
      for (int64_t t = 0; t < sizes.tokens; ++t) is_read |= reads(sizes, problem.positions[b * sizes.tokens + t], k);
      for (int64_t head = b * sizes.key_heads; is_read && head < (b + 1) * sizes.key_heads; ++head) {
        for (int64_t d = 0; d < D; ++d) fill(problem.keys[(head * D + d) * L + k]);
        for (int64_t d = 0; d < V; ++d) fill(problem.values[(head * L + k) * V + d]);
      }
    }
  const float special[] = {INFINITY, -INFINITY, NAN};
  if (random() % 8 == 0) dbf_attention::narrow(special[random() % 3], &problem.q[random() % problem.q.size()]);
  return problem;
}

template <typename T>
Memory<T> run(const dbf_attention::Kernel& kernel, const Problem<T>& problem, int64_t threads) {
  const Sizes& sizes = problem.sizes;
  Memory<T> out(sizes.batch * sizes.tokens * sizes.heads * sizes.value_features);
  dbf_attention::attend_all<T>(kernel, sizes,
                               {problem.q.data(), problem.keys.data(), problem.values.data(), problem.positions.data(),
                                out.data()},
                               check::Threads{threads});
  return out;
}

// One query's result, of one feature after the other, and how far a result in float32 may be from it.
template <typename T>
void attend(const Problem<T>& problem, int64_t b, int64_t t, int64_t h, std::vector<double>& y, std::vector<double>& near) {
  const Sizes& sizes = problem.sizes;
  const int64_t D = sizes.key_features, V = sizes.value_features, L = sizes.length;
  const int64_t head = b * sizes.key_heads + h / (sizes.heads / sizes.key_heads);
  const T* q = problem.q.data() + ((b * sizes.heads + h) * sizes.tokens + t) * D;
  std::vector<double> scores;
  std::vector<int64_t> keys;
  double largest = -INFINITY, inexact = 0.0;
  for (int64_t k = 0; k < L; ++k) {
    if (!reads(sizes, problem.positions[b * sizes.tokens + t], k)) continue;
    double score = 0.0, size = 0.0;
    for (int64_t d = 0; d < D; ++d) {
      const double product = static_cast<double>(dbf_attention::widened(q[d])) * sizes.scale *
                             dbf_attention::widened(problem.keys[(head * D + d) * L + k]);
      score += product;
      size += std::fabs(product);
    }
    if (sizes.cap > 0.0f) score = sizes.cap * std::tanh(score / sizes.cap);
    inexact = std::max(inexact, (D + 8) * 0x1p-23 * size);
    keys.push_back(k);
    scores.push_back(score);
    largest = score > largest || std::isnan(score) ? score : largest;
  }
  double sum = 0.0;
  for (double& score : scores) sum += score = std::exp(score - largest);
  y.assign(V, 0.0);
  near.assign(V, 0.0);
  for (size_t i = 0; i < keys.size(); ++i)
    for (int64_t d = 0; d < V; ++d) {
      const double value = dbf_attention::widened(problem.values[(head * L + keys[i]) * V + d]), weight = scores[i] / sum;
      y[d] += weight * value;
      near[d] += (weight * (2.0 * inexact + keys.size() * 0x1p-23 + 1e-6) + 1e-36) * std::fabs(value);
    }
}

template <typename T>
bool right(const Problem<T>& problem, const Memory<T>& out) {
  const Sizes& sizes = problem.sizes;
  std::vector<double> y, tolerance;
  const T* result = out.data();
  for (int64_t b = 0; b < sizes.batch; ++b)
    for (int64_t t = 0; t < sizes.tokens; ++t)
      for (int64_t h = 0; h < sizes.heads; ++h) {
        attend(problem, b, t, h, y, tolerance);
        for (int64_t d = 0; d < sizes.value_features; ++d) {
          const float own = dbf_attention::widened(*result++);
          if (check::near(own, y[d], tolerance[d] + kRelative<T> * std::fabs(y[d]) + kAbsolute<T>)) continue;
          std::printf("  feature %lld of head %lld, token %lld, row %lld: %g instead of %g\n", static_cast<long long>(d),
                      static_cast<long long>(h), static_cast<long long>(t), static_cast<long long>(b), own, y[d]);
          return false;
        }
      }
  return true;
}

template <typename T>
void check_dtype(Random& random, check::Counts& counts) {
  const Problem<T> problem = make<T>(random);
  const Sizes& sizes = problem.sizes;
  const int64_t threads = 1 + random() % 3;
  const Memory<T> same = run(dbf_attention::usable_kernels().back(), problem, 1);
  for (const dbf_attention::Kernel& kernel : dbf_attention::usable_kernels()) {
    const Memory<T> out = run(kernel, problem, threads);
    const bool good = right(problem, out) && out == same;
    if (!good)
      std::printf("  wrong: B %lld, H %lld, H' %lld, T %lld, D %lld, V %lld, L %lld, window %lld, cap %g, scale %g\n",
                  static_cast<long long>(sizes.batch), static_cast<long long>(sizes.heads),
                  static_cast<long long>(sizes.key_heads), static_cast<long long>(sizes.tokens),
                  static_cast<long long>(sizes.key_features), static_cast<long long>(sizes.value_features),
                  static_cast<long long>(sizes.length), static_cast<long long>(sizes.window), sizes.cap, sizes.scale);
    counts[kernel.name].first += !good;
    ++counts[kernel.name].second;
  }
}

void check_shape(Random& random, check::Counts& counts) {
  constexpr void (*dtypes[])(Random&, check::Counts&) = {check_dtype<float>, check_dtype<BFloat16>, check_dtype<Float16>};
  dtypes[random() % 3](random, counts);
}

}  // namespace

int main(int count, char** arguments) { return check::run(count, arguments, check_shape); }

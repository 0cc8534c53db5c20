// Attention of a few queries over the filled part of a cache, for any instruction set.
//
// No #pragma once: every instruction set includes this text in a namespace of its own, after it has defined DBF_TARGET, the
// attribute of its functions. Without it, as editors and checks include it, the text stands alone.
//
// Keys lie transposed, [D, L], values plain, [L, D]: so both products add rows of 16-bit numbers, weighted by a number each,
// to vectors of 64 sums, and nothing is summed across a vector. Every sum goes through keys in rising order. A result
// therefore depends neither on threads nor on the batch nor on the queries beside it.

#ifndef DBF_TARGET
#include "cpu_types.h"
#define DBF_TARGET
#define DBF_ATTENTION_ALONE
namespace dbf_attention {
#endif

template <typename T>
DBF_TARGET inline Floats load(const T* from) {
  if constexpr (sizeof(T) == 4) {
    Floats values;
    std::memcpy(&values, from, sizeof(values));
    return values;
  } else {
    Halves bits;
    std::memcpy(&bits, from, sizeof(bits));
#ifdef DBF_WIDEN
    const Words wide = DBF_WIDEN(bits);
#else
    const Words wide = __builtin_convertvector(bits, Words);
#endif
    if constexpr (T::is_bfloat16) return reinterpret_cast<Floats>(wide << 16);
    // The exponents of float16 are 112 less than those of float32; a product moves subnormal ones, too.
    const Words size = wide & 0x7FFF;
    const Words finite = reinterpret_cast<Words>(reinterpret_cast<Floats>(size << 13) * 0x1p112f);
    const Words special = reinterpret_cast<Words>(size >= 0x7C00u) & 0x7F800000u;
    return reinterpret_cast<Floats>(finite | special | ((wide & 0x8000) << 16));
  }
}

// c[q][lane] += sum over n of a[q][n] * b[n][lane], for Rows queries and `vectors` registers of lanes.
template <typename T, int Rows, int Vectors>
DBF_TARGET inline void add_products(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count,
                                    float* c, int64_t c_stride) {
  Floats sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int q = 0; q < Rows; ++q)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) std::memcpy(&sums[q][v], c + q * c_stride + v * kLanes, sizeof(Floats));
  for (int64_t n = 0; n < count; ++n, b += b_stride) {
    Floats row[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int q = 0; q < Rows; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[q][v] += a[q * a_stride + n] * row[v];
  }
#pragma GCC unroll 8
  for (int q = 0; q < Rows; ++q)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) std::memcpy(c + q * c_stride + v * kLanes, &sums[q][v], sizeof(Floats));
}

// The same for any number of lanes.
template <typename T, int Rows>
DBF_TARGET inline void add_products(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count,
                                    int64_t lanes, float* c, int64_t c_stride) {
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= lanes; lane += 4 * kLanes)
    add_products<T, Rows, 4>(a, a_stride, b + lane, b_stride, count, c + lane, c_stride);
  for (; lane + kLanes <= lanes; lane += kLanes)
    add_products<T, Rows, 1>(a, a_stride, b + lane, b_stride, count, c + lane, c_stride);
  if (lane == lanes) return;
  const int64_t rest = lanes - lane;  // the last ones, copied so that nothing behind them is read
  for (int64_t n = 0; n < count; ++n) {
    alignas(64) T row[kLanes] = {};
    std::copy_n(b + n * b_stride + lane, rest, row);
    for (int q = 0; q < Rows; ++q) {
      const Floats products = a[q * a_stride + n] * load(row);
      for (int64_t i = 0; i < rest; ++i) c[q * c_stride + lane + i] += products[i];
    }
  }
}

// exp(x) for x <= 0 with a relative error of 2e-7, and NaN for NaN: 2^n times a polynomial of the rest (Cephes' expf).
DBF_TARGET inline Floats exponential(Floats x) {
  const Floats low = Floats{} - 87.0f;
  const auto is_low = reinterpret_cast<Words>(x < low);
  x = reinterpret_cast<Floats>((reinterpret_cast<Words>(low) & is_low) | (reinterpret_cast<Words>(x) & ~is_low));
  const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Floats r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (__builtin_convertvector(whole, Ints) << 23));
}

// Makes weights of the scores [begin, end) of a query; those up to the next whole register become 0. Returns their sum.
DBF_TARGET inline float weigh(float* scores, int64_t begin, int64_t end, float cap) {
  if (cap > 0.0f)
    for (int64_t k = begin; k < end; ++k) scores[k] = cap * std::tanh(scores[k] / cap);
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
  int64_t k = begin;
  for (; k + kLanes <= end; k += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = scores[k + i] > lanes[i] ? scores[k + i] : lanes[i];
  for (; k < end; ++k) lanes[0] = scores[k] > lanes[0] ? scores[k] : lanes[0];
  const float largest = *std::max_element(lanes, lanes + kLanes);
  Floats sums{};
  for (k = begin; k < end; k += kLanes) {
    const int64_t rest = end - k;
    Floats x;
    if (rest >= kLanes) {
      std::memcpy(&x, scores + k, sizeof(x));
      x = exponential(x - largest);
      sums += x;
      std::memcpy(scores + k, &x, sizeof(x));
      continue;
    }
    alignas(64) float last[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) last[i] = i < rest ? scores[k + i] - largest : -1000.0f;
    std::memcpy(&x, last, sizeof(x));
    x = exponential(x);
    for (int64_t i = 0; i < rest; ++i) {
      sums[i] += x[i];
      scores[k + i] = x[i];
    }
  }
  float sum = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

// Calls a body with the number of queries as a constant.
template <typename Body>
DBF_TARGET inline void for_rows(int64_t rows, const Body& body) {
  static_assert(kRowsAtOnce == 4);
  if (rows == 1) body(std::integral_constant<int, 1>{});
  if (rows == 2) body(std::integral_constant<int, 2>{});
  if (rows == 3) body(std::integral_constant<int, 3>{});
  if (rows == 4) body(std::integral_constant<int, 4>{});
}

// Queries [first, first + count) of one row and one head of keys; count <= kQueries.
template <typename T>
DBF_TARGET void attend(const Problem& problem, const T* keys, const T* values, const Span* spans, const float* queries,
                       int64_t count, float* scores, float* out) {
  const int64_t D = problem.key_features, V = problem.value_features, L = problem.length, stride = problem.score_stride;
  for (int64_t q = 0; q < count; q += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, count - q);
    int64_t begin = spans[q].begin, end = spans[q].end, inner_begin = begin, inner_end = end;
    for (int64_t i = 1; i < rows; ++i) {
      begin = std::min(begin, spans[q + i].begin);
      end = std::max(end, spans[q + i].end);
      inner_begin = std::max(inner_begin, spans[q + i].begin);
      inner_end = std::min(inner_end, spans[q + i].end);
    }
    // Whole registers are faster than the last keys one by one. What stands behind the last of them is not used.
    const int64_t aligned_end = std::min((end + kBlock - 1) / kBlock * kBlock, L), aligned_begin = begin / kBlock * kBlock;
    float* own = scores + q * stride;
    const float* a = queries + q * D;
    float* y = out + q * V;
    for (int64_t i = 0; i < rows; ++i) std::fill(own + i * stride + aligned_begin, own + i * stride + aligned_end, 0.0f);
    std::fill(y, y + rows * V, 0.0f);
    const auto score = [&](auto at_once) DBF_TARGET {
      add_products<T, decltype(at_once)::value>(a, D, keys + aligned_begin, L, D, aligned_end - aligned_begin,
                                                own + aligned_begin, stride);
    };
    for_rows(rows, score);
    float sums[kRowsAtOnce];
    for (int64_t i = 0; i < rows; ++i)
      sums[i] = weigh(own + i * stride, spans[q + i].begin, spans[q + i].end, problem.cap);
    const auto add = [&](auto at_once, int64_t i, int64_t from, int64_t to) DBF_TARGET {
      if (from < to)
        add_products<T, decltype(at_once)::value>(own + i * stride + from, stride, values + from * V, V, to - from, V,
                                                  y + i * V, V);
    };
    // Keys that all of these queries read are read once. What lies beside them belongs to some of the queries.
    const bool together = inner_begin < inner_end;
    for (int64_t i = 0; i < rows; ++i)
      add(std::integral_constant<int, 1>{}, i, spans[q + i].begin, together ? inner_begin : spans[q + i].end);
    if (together) {
      for_rows(rows, [&](auto at_once) DBF_TARGET { add(at_once, 0, inner_begin, inner_end); });
      for (int64_t i = 0; i < rows; ++i) add(std::integral_constant<int, 1>{}, i, inner_end, spans[q + i].end);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < V; ++d) y[i * V + d] = y[i * V + d] / sums[i];
  }
}

#ifdef DBF_ATTENTION_ALONE
}  // namespace dbf_attention
#undef DBF_ATTENTION_ALONE
#undef DBF_TARGET
#endif

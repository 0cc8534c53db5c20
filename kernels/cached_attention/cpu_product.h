// Attention over the filled part of a cache on CPUs, for any instruction set.
//
//     out[b, t, h] = sum over the keys k that the query reads of softmax(scale * q[b, h, t] . keys[b, h / group, :, k]) * values[..., k]
//
// cpu_types.h <- cpu_attention.h, once for each instruction set <- this file. None includes torch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "../amx.h"
#include "cpu_types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dbf_attention {
#if defined(__x86_64__)
namespace avx512 {
#define DBF_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
// Compilers split the conversion of 16 numbers into four otherwise.
#define DBF_WIDEN(bits) reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)))
#include "cpu_attention.h"
#undef DBF_WIDEN
#undef DBF_TARGET
}  // namespace avx512
namespace avx2 {
#define DBF_TARGET __attribute__((target("avx2")))
#include "cpu_attention.h"
#undef DBF_TARGET
}  // namespace avx2
#endif
namespace portable {
#define DBF_TARGET __attribute__((unused))
#include "cpu_attention.h"
#undef DBF_TARGET
}  // namespace portable

template <typename T>
using Attend = void (*)(const Problem&, const T*, const T*, const Span*, const float*, int64_t, float*, float*);

struct Kernel {
  const char* name;
  std::tuple<Attend<float>, Attend<BFloat16>, Attend<Float16>> attend;
};

// What this processor runs, under the names of $DBF_CPU_ISA, fastest first.
inline std::vector<Kernel> usable_kernels() {
  std::vector<Kernel> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool vectors = __builtin_cpu_supports("avx2");
  const bool wide = vectors && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vbmi = wide && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  const Kernel widest{"avx512", {avx512::attend<float>, avx512::attend<BFloat16>, avx512::attend<Float16>}};
  if (vbmi && dbf::has_amx()) kernels.push_back({"amx", widest.attend});
  if (vbmi) kernels.push_back({"avx512_vbmi", widest.attend});
  if (wide) kernels.push_back(widest);
  if (vectors) kernels.push_back({"avx2", {avx2::attend<float>, avx2::attend<BFloat16>, avx2::attend<Float16>}});
#endif
  const Kernel any{"portable", {portable::attend<float>, portable::attend<BFloat16>, portable::attend<Float16>}};
#if defined(__aarch64__)
  kernels.push_back({"neon", any.attend});  // what compilers make of it
#endif
  kernels.push_back(any);
  return kernels;
}

// The kernel that $DBF_CPU_ISA names, else the fastest; null if this processor does not run the named one.
inline const Kernel* choose_kernel() {
  static const std::vector<Kernel> usable = usable_kernels();
  const char* name = std::getenv("DBF_CPU_ISA");
  if (name == nullptr || *name == 0) return usable.data();
  for (const Kernel& kernel : usable)
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  return nullptr;
}

inline std::string usable_names() {
  std::string names;
  for (const Kernel& kernel : usable_kernels()) names += (names.empty() ? "" : ", ") + std::string(kernel.name);
  return names;
}

inline float widened(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float widened(Float16 value) {
  Float16 lanes[kLanes] = {value};
  return portable::load(lanes)[0];
}
inline float widened(float value) { return value; }

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}
inline void narrow(float value, Float16* to) {
  const float size = std::fabs(value);
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  uint16_t half;
  if (bits >= 0x47800000) {  // 65536 and above, infinity, NaN
    half = bits > 0x7F800000 ? 0x7E00 : 0x7C00;
  } else if (size < 0x1p-14f) {  // a sum with 0.5 moves the last place of a subnormal number to that of the sum
    const float shifted = size + 0.5f;
    std::memcpy(&bits, &shifted, 4);
    half = static_cast<uint16_t>(bits - 0x3F000000);
  } else {  // an overflow of the mantissa raises the exponent, up to infinity
    half = static_cast<uint16_t>((bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13);
  }
  to->bits = static_cast<uint16_t>(half | (std::signbit(value) ? 0x8000 : 0));
}

constexpr int64_t kProductsPerTask = 1 << 18;  // fewer do not pay for waking a thread

// The sizes and settings of a call.
struct Sizes {
  int64_t batch, heads, key_heads, tokens, key_features, value_features, length;
  int64_t window;  // keys that a query reads at most; 0 for all up to its position
  float scale, cap;
};

// Contiguous q [B, H, T, D], keys [B, H', D, L], values [B, H', L, V], positions [B, T] from 0 to L - 1, out [B, T, H, V].
template <typename T>
struct Arrays {
  const T *q, *keys, *values;
  const int64_t* positions;
  T* out;
};

// Attention of all queries.
//   parallel(count, grain, body(begin, end)) runs body over [0, count) on any number of threads
template <typename T, typename Parallel>
void attend_all(const Kernel& kernel, const Sizes& sizes, const Arrays<T>& arrays, const Parallel& parallel) {
  const int64_t H = sizes.heads, D = sizes.key_features, V = sizes.value_features, tokens = sizes.tokens;
  const int64_t heads = sizes.key_heads, length = sizes.length, group = H / heads;
  const int64_t per_head = tokens * group, blocks = (per_head + kQueries - 1) / kQueries;
  int64_t longest = 0;
  for (int64_t i = 0; i < sizes.batch * tokens; ++i) longest = std::max(longest, arrays.positions[i] + 1);
  const Problem problem{D, V, length, (longest + kBlock - 1) / kBlock * kBlock, sizes.cap};
  const Attend<T> attend = std::get<Attend<T>>(kernel.attend);
  const int64_t work = std::max<int64_t>(std::min(kQueries, per_head) * longest * (D + V), 1);
  parallel(sizes.batch * heads * blocks, (kProductsPerTask + work - 1) / work, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> memory;
    memory.resize(std::max<size_t>(memory.size(), kQueries * (D + V + problem.score_stride)));
    float *queries = memory.data(), *results = queries + kQueries * D, *scores = results + kQueries * V;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row_head = task / blocks, b = row_head / heads, head = row_head % heads;
      const int64_t begin = task % blocks * kQueries, count = std::min(kQueries, per_head - begin);
      Span spans[kQueries];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = (begin + i) / group, h = head * group + (begin + i) % group;
        const int64_t end = arrays.positions[b * tokens + token] + 1;
        spans[i] = {sizes.window > 0 ? std::max<int64_t>(0, end - sizes.window) : 0, end};
        const T* x = arrays.q + ((b * H + h) * tokens + token) * D;
        for (int64_t d = 0; d < D; ++d) queries[i * D + d] = widened(x[d]) * sizes.scale;
      }
      attend(problem, arrays.keys + row_head * D * length, arrays.values + row_head * length * V, spans, queries, count,
             scores, results);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = (begin + i) / group, h = head * group + (begin + i) % group;
        T* y = arrays.out + ((b * tokens + token) * H + h) * V;
        for (int64_t d = 0; d < V; ++d) narrow(results[i * V + d], y + d);
      }
    }
  });
}

}  // namespace dbf_attention

// The torch operator of attention over a cache on CPUs: checks, dtypes, threads. The products are in cpu_attention.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

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
}  // namespace dbf_attention

namespace {

using namespace dbf_attention;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
using Attend = void (*)(const Problem&, const T*, const T*, const Span*, const float*, int64_t, float*, float*);

template <typename T>
Attend<T> chosen() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return avx512::attend<T>;
  if (__builtin_cpu_supports("avx2")) return avx2::attend<T>;
#endif
  return portable::attend<T>;
}

float widened(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
float widened(Float16 value) {
  Float16 lanes[kLanes] = {value};
  return portable::load(lanes)[0];
}
float widened(float value) { return value; }

void narrow(float value, float* to) { *to = value; }
void narrow(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}
void narrow(float value, Float16* to) {
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

template <typename T>
void run(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& positions, const Tensor& out,
         double scale, int64_t window, double cap) {
  const int64_t B = q.size(0), H = q.size(1), tokens = q.size(2), D = q.size(3);
  const int64_t heads = keys.size(1), length = keys.size(3), V = values.size(3), group = H / heads;
  const int64_t per_head = tokens * group, blocks = (per_head + kQueries - 1) / kQueries;
  const auto* from = static_cast<const T*>(q.const_data_ptr());
  const auto* all_keys = static_cast<const T*>(keys.const_data_ptr());
  const auto* all_values = static_cast<const T*>(values.const_data_ptr());
  const auto* at = static_cast<const int64_t*>(positions.const_data_ptr());
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  int64_t longest = 0;
  for (int64_t i = 0; i < B * tokens; ++i) {
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < length, "dbf_native got the position ", at[i], " in a cache of ", length);
    longest = std::max(longest, at[i] + 1);
  }
  const Problem problem{D, V, length, (longest + 63) / 64 * 64, static_cast<float>(cap)};
  static const Attend<T> attend = chosen<T>();
  const int64_t work = std::max<int64_t>(std::min(kQueries, per_head) * longest * (D + V), 1);
  torch::stable::parallel_for(0, B * heads * blocks, (kProductsPerTask + work - 1) / work, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> memory;
    memory.resize(std::max<size_t>(memory.size(), kQueries * (D + V + problem.score_stride)));
    float *queries = memory.data(), *results = queries + kQueries * D, *scores = results + kQueries * V;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row_head = task / blocks, b = row_head / heads, head = row_head % heads;
      const int64_t begin = task % blocks * kQueries, count = std::min(kQueries, per_head - begin);
      Span spans[kQueries];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = (begin + i) / group, h = head * group + (begin + i) % group;
        const int64_t end = at[b * tokens + token] + 1;
        spans[i] = {window > 0 ? std::max<int64_t>(0, end - window) : 0, end};
        const T* x = from + ((b * H + h) * tokens + token) * D;
        for (int64_t d = 0; d < D; ++d) queries[i * D + d] = widened(x[d]) * static_cast<float>(scale);
      }
      attend(problem, all_keys + row_head * D * length, all_values + row_head * length * V, spans, queries, count,
             scores, results);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = (begin + i) / group, h = head * group + (begin + i) % group;
        T* y = to + ((b * tokens + token) * H + h) * V;
        for (int64_t d = 0; d < V; ++d) narrow(results[i * V + d], y + d);
      }
    }
  });
}

Tensor cached_attention_out(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& positions,
                            double scale, int64_t window, double cap, Tensor out) {
  STD_TORCH_CHECK(q.dim() == 4 && keys.dim() == 4 && values.dim() == 4 && positions.dim() == 2 && out.dim() == 4,
                  "dbf_native got attention of other dimensions");
  for (const Tensor* tensor : {&q, &keys, &values, &positions, static_cast<const Tensor*>(&out)})
    STD_TORCH_CHECK(tensor->is_contiguous(), "dbf_native needs contiguous tensors");
  const int64_t B = q.size(0), H = q.size(1), tokens = q.size(2), heads = keys.size(1), length = keys.size(3);
  STD_TORCH_CHECK(keys.size(0) == B && values.size(0) == B && values.size(1) == heads && values.size(2) == length &&
                      keys.size(2) == q.size(3) && heads > 0 && H % heads == 0 && positions.size(0) == B &&
                      positions.size(1) == tokens && out.size(0) == B && out.size(1) == tokens && out.size(2) == H &&
                      out.size(3) == values.size(3),
                  "dbf_native got attention whose sizes do not fit together");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(keys.scalar_type() == dtype && values.scalar_type() == dtype && out.scalar_type() == dtype &&
                      positions.scalar_type() == ScalarType::Long,
                  "dbf_native needs attention of one dtype, and positions of int64");
  if (dtype == ScalarType::Float) {
    run<float>(q, keys, values, positions, out, scale, window, cap);
  } else if (dtype == ScalarType::BFloat16) {
    run<BFloat16>(q, keys, values, positions, out, scale, window, cap);
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half, "dbf_native takes float32, bfloat16 or float16 for attention");
    run<Float16>(q, keys, values, positions, out, scale, window, cap);
  }
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dbf_native, library) {
  library.def(
      "cached_attention.out(Tensor q, Tensor keys, Tensor values, Tensor positions, *, float scale, int window=0, "
      "float cap=0.0, Tensor(a!) out) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(dbf_native, CPU, library) {
  library.impl("cached_attention.out", TORCH_BOX(&cached_attention_out));
}

}  // namespace

// y[m, n] = out_scale[n] * sum_k signs[n, k] * (in_scale[k] * x[m, k]) + bias[n] by table look-up: signs meet
// additions only. Each scale is multiplied once with each activation, on its way into the tables or out of the sums.
//
// Four neighbouring columns have 16 possible signed sums. They are computed once per token with additions,
// then every row of the sign matrix replaces four additions by one look-up and one addition; the four sign
// bits are the index (bit 1 = +1, least significant bit = first column; layout of dbf_compile/signs.py).
//
// Tokens lie in the lanes of a vector, so one index serves Tokens sums and any vector unit will do.
// A sum runs over the groups of four from left to right, whatever the number of threads, rows or tokens in
// flight: the result of one token depends on nothing but its activations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int64_t kWordBits = 32;
constexpr int64_t kGroup = 4;             // columns that share one table
constexpr int64_t kEntries = 16;          // 2 ^ kGroup signed sums
constexpr int64_t kGroupsPerWord = kWordBits / kGroup;
constexpr int64_t kTableBytes = 16 << 10;  // tables in flight: half of a 32 KiB first-level cache
constexpr int64_t kRows = 256;             // rows per task: building the tables is then 1/16 of the look-ups
constexpr int64_t kUnroll = 4;             // independent sums that hide the latency of an addition

template <int Tokens>
struct Lanes {
  typedef float type __attribute__((vector_size(Tokens * sizeof(float))));
};
template <>
struct Lanes<1> {
  typedef float type;
};

template <int Tokens>
inline void set_lane(typename Lanes<Tokens>::type& vector, int lane, float value) {
  if constexpr (Tokens == 1) {
    vector = value;
  } else {
    vector[lane] = value;
  }
}

template <int Tokens>
inline float get_lane(const typename Lanes<Tokens>::type& vector, int lane) {
  if constexpr (Tokens == 1) {
    return vector;
  } else {
    return vector[lane];
  }
}

// table[e] = (+-x0 +- x1) + (+-x2 +- x3), the sign of x_j given by bit j of e.
template <typename Vector>
inline void build_table(const Vector x[kGroup], Vector* table) {
  const Vector low[4] = {-x[0] - x[1], x[0] - x[1], x[1] - x[0], x[0] + x[1]};
  const Vector high[4] = {-x[2] - x[3], x[2] - x[3], x[3] - x[2], x[2] + x[3]};
  for (int64_t entry = 0; entry < kEntries; ++entry) table[entry] = low[entry & 3] + high[entry >> 2];
}

template <int Rows, typename Vector>
inline void look_up(const int32_t* words, int64_t stride, int64_t count, const Vector* tables, Vector* sums) {
  Vector sum[Rows];
  for (int row = 0; row < Rows; ++row) sum[row] = sums[row];
  for (int64_t w = 0; w < count; ++w) {
    uint32_t word[Rows];
    for (int row = 0; row < Rows; ++row) word[row] = static_cast<uint32_t>(words[row * stride + w]);
    const Vector* table = tables + w * kGroupsPerWord * kEntries;
    for (int64_t group = 0; group < kGroupsPerWord; ++group, table += kEntries)
      for (int row = 0; row < Rows; ++row) sum[row] += table[(word[row] >> (kGroup * group)) & (kEntries - 1)];
  }
  for (int row = 0; row < Rows; ++row) sums[row] = sum[row];
}

// A scale or a bias in float32; nothing where there is none.
using Vector1d = std::optional<std::vector<float>>;

// The sums of one row of the output, scaled, shifted and rounded to its dtype.
template <typename Out>
struct Store {
  const Vector1d& scale;
  const Vector1d& bias;
  Out* y;
  void operator()(int64_t row, int64_t column, int64_t stride, float sum) const {
    if (scale) sum *= (*scale)[column];
    if (bias) sum += (*bias)[column];
    y[row * stride + column] = static_cast<Out>(sum);
  }
};

// Tokens rows of x against rows [begin, end) of the sign matrix; end - begin <= kRows.
template <int Tokens, typename Scalar, typename Out>
void multiply_tile(const Scalar* x, int64_t columns, const float* scale, const int32_t* signs, int64_t words,
                   int64_t begin, int64_t end, const Store<Out>& store, int64_t token, int64_t y_stride) {
  using Vector = typename Lanes<Tokens>::type;
  constexpr int64_t kBlock = kTableBytes / (kGroupsPerWord * kEntries * sizeof(Vector));  // words per block
  alignas(64) Vector tables[kBlock * kGroupsPerWord * kEntries];
  alignas(64) Vector sums[kRows] = {};
  for (int64_t first = 0; first < words; first += kBlock) {
    const int64_t count = std::min(kBlock, words - first);
    for (int64_t group = 0; group < count * kGroupsPerWord; ++group) {
      Vector values[kGroup] = {};
      for (int64_t j = 0; j < kGroup; ++j) {
        const int64_t column = first * kWordBits + group * kGroup + j;
        if (column >= columns) break;  // columns that pad the last word count as zero
        for (int lane = 0; lane < Tokens; ++lane)
          set_lane<Tokens>(values[j], lane, static_cast<float>(x[lane * columns + column]));
        if (scale != nullptr) values[j] *= scale[column];
      }
      build_table(values, tables + group * kEntries);
    }
    int64_t row = begin;
    for (; row + kUnroll <= end; row += kUnroll)
      look_up<kUnroll>(signs + row * words + first, words, count, tables, sums + (row - begin));
    for (; row < end; ++row)
      look_up<1>(signs + row * words + first, words, count, tables, sums + (row - begin));
  }
  for (int lane = 0; lane < Tokens; ++lane)
    for (int64_t row = begin; row < end; ++row)
      store(token + lane, row, y_stride, get_lane<Tokens>(sums[row - begin], lane));
}

// The widest tiles first: M tokens are full tiles of 16, then one tile each of 8, 4, 2, 1 as needed.
struct TokenTile {
  int64_t first;
  int64_t count;
};
inline int64_t token_tiles(int64_t tokens) { return tokens / 16 + __builtin_popcountll(tokens % 16); }
inline TokenTile token_tile(int64_t tokens, int64_t index) {
  const int64_t full = tokens / 16;
  if (index < full) return {index * 16, 16};
  int64_t first = full * 16;
  for (int64_t count = 8, left = index - full; count > 0; count /= 2) {
    if (!(tokens & count)) continue;
    if (left-- == 0) return {first, count};
    first += count;
  }
  return {first, 0};
}

template <typename Scalar, typename Out>
void multiply(const Tensor& x, const Tensor& signs, const Vector1d& in_scale, const Vector1d& out_scale,
              const Vector1d& bias, const Tensor& out) {
  const int64_t columns = x.size(x.dim() - 1), rows = signs.size(0), words = signs.size(1);
  const int64_t tokens = rows == 0 ? 0 : out.numel() / rows;
  if (tokens == 0) return;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t tiles = token_tiles(tokens);
  const int64_t split = std::max<int64_t>(1, threads / tiles);  // few tokens: let every thread have rows
  const int64_t chunk = std::min(kRows, (rows + split - 1) / split);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const auto* x_data = static_cast<const Scalar*>(x.const_data_ptr());
  const auto* sign_data = static_cast<const int32_t*>(signs.const_data_ptr());
  const float* scale = in_scale ? in_scale->data() : nullptr;
  const Store<Out> store{out_scale, bias, static_cast<Out*>(out.mutable_data_ptr())};
  torch::stable::parallel_for(0, tiles * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const TokenTile tile = token_tile(tokens, task / chunks);
      const int64_t first = (task % chunks) * chunk, last = std::min(first + chunk, rows);
      const Scalar* x_tile = x_data + tile.first * columns;
      const auto run = [&](auto count) {
        multiply_tile<count()>(x_tile, columns, scale, sign_data, words, first, last, store, tile.first, rows);
      };
      switch (tile.count) {
        case 16: run(std::integral_constant<int, 16>()); break;
        case 8: run(std::integral_constant<int, 8>()); break;
        case 4: run(std::integral_constant<int, 4>()); break;
        case 2: run(std::integral_constant<int, 2>()); break;
        default: run(std::integral_constant<int, 1>()); break;
      }
    }
  });
}

using torch::headeronly::ScalarType;

// Calls visit with a value of the C++ type of a floating-point dtype.
template <typename Visit>
void visit_dtype(ScalarType dtype, const char* what, Visit visit) {
  switch (dtype) {
    case ScalarType::Float: visit(float()); break;
    case ScalarType::BFloat16: visit(c10::BFloat16()); break;
    case ScalarType::Half: visit(c10::Half()); break;
    default: STD_TORCH_CHECK(false, "dbf_native::sign_matmul takes float32, bfloat16 or float16 for ", what);
  }
}

Vector1d to_float(const std::optional<Tensor>& given, int64_t size, const char* name) {
  if (!given) return std::nullopt;
  STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == size && given->is_contiguous(),
                  "dbf_native::sign_matmul needs a contiguous vector of one value per feature as ", name);
  std::vector<float> values(size);
  visit_dtype(given->scalar_type(), name, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(given->const_data_ptr());
    for (int64_t i = 0; i < size; ++i) values[i] = static_cast<float>(data[i]);
  });
  return values;
}

Tensor sign_matmul_out(const Tensor& x, const Tensor& signs, std::optional<Tensor> in_scale,
                       std::optional<Tensor> out_scale, std::optional<Tensor> bias, Tensor out) {
  STD_TORCH_CHECK(x.is_contiguous() && signs.is_contiguous() && out.is_contiguous(),
                  "dbf_native::sign_matmul needs contiguous tensors");
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Int, "dbf_native::sign_matmul needs int32 signs");
  STD_TORCH_CHECK(x.dim() > 0 && signs.dim() == 2 && out.dim() == x.dim() &&
                      signs.size(1) == (x.size(x.dim() - 1) + kWordBits - 1) / kWordBits &&
                      out.size(out.dim() - 1) == signs.size(0) &&
                      out.numel() * x.size(x.dim() - 1) == x.numel() * signs.size(0),
                  "dbf_native::sign_matmul got tensors whose sizes do not fit together");
  const Vector1d before = to_float(in_scale, x.size(x.dim() - 1), "in_scale");
  const Vector1d after = to_float(out_scale, signs.size(0), "out_scale");
  const Vector1d shift = to_float(bias, signs.size(0), "bias");
  visit_dtype(x.scalar_type(), "x", [&](auto x_zero) {
    visit_dtype(out.scalar_type(), "out", [&](auto out_zero) {
      multiply<decltype(x_zero), decltype(out_zero)>(x, signs, before, after, shift, out);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY(dbf_native, library) {
  library.def(
      "sign_matmul.out(Tensor x, Tensor signs, Tensor? in_scale=None, Tensor? out_scale=None, Tensor? bias=None, "
      "*, Tensor(a!) out) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(dbf_native, CPU, library) {
  library.impl("sign_matmul.out", TORCH_BOX(&sign_matmul_out));
}

}  // namespace

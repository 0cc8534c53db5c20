// The torch operators of the steps of an ADMM update on CPUs: checks, dtypes, threads. The loops are in cpu_update.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "cpu_update.h"

namespace {

using namespace dbf_factor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements of a thread, below which a second one does not pay

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* written(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void check(const Tensor& tensor, std::initializer_list<int64_t> sizes, bool may_be_narrow = false) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous();
  int64_t dim = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dim++) == size;
  STD_TORCH_CHECK(fits, "dbf_native got the parts of a factor whose sizes or layouts do not fit together");
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || (may_be_narrow && dtype == ScalarType::BFloat16),
                  "dbf_native got a factor of a dtype that is not float32");
}

// A factor [batch, rows, columns] and its magnitude.
struct Factor {
  Factor(const Tensor& point, const Tensor& rows, const Tensor& columns) {
    STD_TORCH_CHECK(point.dim() == 3, "dbf_native got a factor that is no batch of matrices");
    batch = point.size(0), height = point.size(1), width = point.size(2);
    check(point, {batch, height, width});
    check(rows, {batch, height});
    check(columns, {batch, width});
    this->rows = read<float>(rows), this->columns = read<float>(columns);
  }

  // Of a row of the whole batch.
  Magnitude size(int64_t row) const { return {rows[row], columns + row / height * width}; }

  int64_t batch, height, width;
  const float* rows;
  const float* columns;
};

// Calls body(begin, end) for rows of so many elements.
template <typename Body>
void for_rows(int64_t rows, int64_t width, const Body& body) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), body);
}

// A row as float32, which a buffer holds where the tensor has bfloat16.
const float* widened(const Tensor& tensor, int64_t start, int64_t count, std::vector<float>& buffer) {
  if (tensor.scalar_type() == ScalarType::Float) return read<float>(tensor) + start;
  widen(read<uint16_t>(tensor) + start, count, buffer.data());
  return buffer.data();
}

// Writes a row by write(float*), rounded where the tensor has bfloat16.
template <typename Write>
void write_row(Tensor& tensor, int64_t start, int64_t count, std::vector<float>& buffer, const Write& write) {
  if (tensor.scalar_type() == ScalarType::Float) {
    write(written<float>(tensor) + start);
  } else {
    write(buffer.data());
    narrow(buffer.data(), count, written<uint16_t>(tensor) + start);
  }
}

Tensor factor_anchor_out(const Tensor& point, const Tensor& rows, const Tensor& columns, double leak, Tensor out) {
  const Factor factor(point, rows, columns);
  const int64_t height = factor.height, width = factor.width, blocks = (height + kBlock - 1) / kBlock;
  check(out, {factor.batch, width, height}, true);
  for_rows(factor.batch * blocks, kBlock * width, [&](int64_t begin, int64_t end) {
    float tile[kBlock * kTile];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t item = block / blocks, first = block % blocks * kBlock, count = std::min(kBlock, height - first);
      for (int64_t left = 0; left < width; left += kTile) {
        const int64_t part = std::min(kTile, width - left);
        for (int64_t row = 0; row < count; ++row) {
          const Magnitude size = factor.size(item * height + first + row);
          anchor_row(read<float>(point) + (item * height + first + row) * width + left, {size.row, size.columns + left},
                     part, static_cast<float>(leak), tile + row * kTile);
        }
        const int64_t start = (item * width + left) * height + first;
        if (out.scalar_type() == ScalarType::Float)
          turn(tile, count, part, height, written<float>(out) + start);
        else
          turn_narrow(tile, count, part, height, written<uint16_t>(out) + start);
      }
    }
  });
  return out;
}

void factor_rest(const Tensor& target, const Tensor& share, Tensor product) {
  STD_TORCH_CHECK(target.dim() == 3, "dbf_native got a target that is no batch of matrices");
  const int64_t batch = target.size(0), height = target.size(1), width = target.size(2);
  check(target, {batch, height, width});
  check(share, {batch});
  check(product, {batch, height, width}, true);
  for_rows(batch * height, width, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(width);
    for (int64_t row = begin; row < end; ++row) {
      const float* wide = widened(product, row * width, width, buffer);
      write_row(product, row * width, width, buffer, [&](float* result) {
        rest_row(read<float>(target) + row * width, wide, read<float>(share)[row / height], width, result);
      });
    }
  });
}

// Fits the magnitude to sums over columns, and to sums over the rows of every block.
void fit(const std::vector<float>& sums, const std::vector<float>& parts, int64_t width, float* rows, float* columns) {
  const float before = std::max(norm(sums.data(), sums.size()), kTiny);
  std::vector<float> other(width);
  for (size_t part = 0; part < parts.size(); part += width)
    for (int64_t i = 0; i < width; ++i) other[i] += parts[part + i];
  for (float& value : other) value /= before;
  const float size = norm(other.data(), width);
  for (size_t row = 0; row < sums.size(); ++row) rows[row] = size * (sums[row] / before);
  for (int64_t i = 0; i < width; ++i) columns[i] = other[i] / std::max(size, kTiny);
}

void factor_advance(Tensor point, Tensor rows, Tensor columns, const Tensor& step, const Tensor& share, double relaxation,
                    double leak, bool keep_columns) {
  const Factor factor(point, rows, columns);
  const int64_t height = factor.height, width = factor.width;
  check(step, {factor.batch, height, width}, true);
  check(share, {factor.batch});
  const int64_t blocks = (height + kBlock - 1) / kBlock;
  std::vector<float> sums(height), parts(keep_columns ? 0 : blocks * width);
  for (int64_t item = 0; item < factor.batch; ++item) {
    const double part = read<float>(share)[item], of_dual = leak * (1 - relaxation * part);
    const Advance by{static_cast<float>(1 - relaxation + relaxation * part - of_dual), static_cast<float>(of_dual),
                     static_cast<float>(relaxation)};
    std::fill(parts.begin(), parts.end(), 0.0f);
    for_rows(blocks, kBlock * width, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(width);
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t row = block * kBlock; row < std::min(height, (block + 1) * kBlock); ++row) {
          const int64_t start = (item * height + row) * width;
          float* to = written<float>(point) + start;
          const float* move = widened(step, start, width, buffer);
          sums[row] = advance_row(to, factor.size(item * height + row), move, by, width);
          if (!keep_columns) add_magnitude(to, sums[row], width, parts.data() + block * width);
        }
      }
    });
    float* new_rows = written<float>(rows) + item * height;
    if (keep_columns)
      std::copy(sums.begin(), sums.end(), new_rows);
    else
      fit(sums, parts, width, new_rows, written<float>(columns) + item * width);
  }
}

void factor_average(const Tensor& point, const Tensor& rows, const Tensor& columns, double averaging, Tensor basis) {
  const Factor factor(point, rows, columns);
  check(basis, {factor.batch, factor.height, factor.width});
  for_rows(factor.batch * factor.height, factor.width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      average_row(read<float>(point) + row * factor.width, factor.size(row), static_cast<float>(averaging), factor.width,
                  written<float>(basis) + row * factor.width);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(dbf_native, library) {
  library.def("factor_anchor.out(Tensor point, Tensor rows, Tensor columns, float leak, *, Tensor(a!) out) -> Tensor(a!)");
  library.def("factor_rest(Tensor target, Tensor share, Tensor(a!) product) -> ()");
  library.def(
      "factor_advance(Tensor(a!) point, Tensor(b!) rows, Tensor(c!) columns, Tensor step, Tensor share, float relaxation, "
      "float leak, bool keep_columns) -> ()");
  library.def("factor_average(Tensor point, Tensor rows, Tensor columns, float averaging, Tensor(a!) basis) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dbf_native, CPU, library) {
  library.impl("factor_anchor.out", TORCH_BOX(&factor_anchor_out));
  library.impl("factor_rest", TORCH_BOX(&factor_rest));
  library.impl("factor_advance", TORCH_BOX(&factor_advance));
  library.impl("factor_average", TORCH_BOX(&factor_average));
}

}  // namespace

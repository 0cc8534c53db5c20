// The torch operators of the CPU kernels: dtypes, scales, threads. The product itself is in cpu_product.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu_product.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

const dbf::Kernel& chosen_kernel() {
  const dbf::Kernel* chosen = dbf::choose_kernel();
  STD_TORCH_CHECK(chosen != nullptr, "DBF_CPU_ISA=", std::getenv("DBF_CPU_ISA"), "; allowed here: ",
                  dbf::usable_names(), "; unset it for the fastest");
  return *chosen;
}

int64_t bytes_of(ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dbf_native takes float32, bfloat16 or float16 for ", what);
  return dtype == ScalarType::Float ? 4 : 2;
}

void to_float(const dbf::Kernel& kernel, const void* from, ScalarType dtype, int64_t count, float* to) {
  if (dtype == ScalarType::Float) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == ScalarType::Half) {
    kernel.half_to_float(static_cast<const uint16_t*>(from), count, to);
  } else {
    const auto* halves = static_cast<const uint16_t*>(from);
    auto* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(halves[i]) << 16;
  }
}

void from_float(const dbf::Kernel& kernel, const float* from, ScalarType dtype, int64_t count, void* to) {
  if (dtype == ScalarType::Float) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == ScalarType::Half) {
    kernel.float_to_half(from, count, static_cast<uint16_t*>(to));
  } else {
    auto* halves = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
      halves[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
  }
}

// A scale or a bias in float32, or none. The next call reuses its memory.
class Vector {
 public:
  void load(const dbf::Kernel& kernel, const std::optional<Tensor>& vector, int64_t size, const char* name) {
    values_ = nullptr;
    if (!vector) return;
    STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == size && vector->is_contiguous(),
                    "dbf_native needs a contiguous vector of one value per feature as ", name);
    bytes_of(vector->scalar_type(), name);
    float* values = memory_.get(size);
    to_float(kernel, vector->const_data_ptr(), vector->scalar_type(), size, values);
    values_ = values;
  }
  void multiply(float* x, int64_t first, int64_t count) const {
    if (values_ != nullptr)
      for (int64_t i = 0; i < count; ++i) x[i] *= values_[first + i];
  }
  void add(float* x, int64_t first, int64_t count) const {
    if (values_ != nullptr)
      for (int64_t i = 0; i < count; ++i) x[i] += values_[first + i];
  }

 private:
  dbf::Scratch<float> memory_;
  const float* values_ = nullptr;
};

dbf::Signs checked_signs(const Tensor& signs, int64_t columns, bool interleaved) {
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Int, "dbf_native needs int32 signs");
  STD_TORCH_CHECK(signs.is_contiguous(), "dbf_native needs contiguous signs");
  STD_TORCH_CHECK(signs.dim() == 2 && signs.size(1) == dbf::ceil_div(columns, dbf::kWordBits),
                  "dbf_native got signs and activations whose sizes do not fit together");
  return {signs.const_data_ptr(), signs.size(0), columns, interleaved};
}

int64_t checked_tokens(const Tensor& x, const Tensor& out, int64_t columns, int64_t rows) {
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous(), "dbf_native needs contiguous tensors");
  STD_TORCH_CHECK(out.dim() == x.dim() && columns_of(out) == rows && out.numel() * columns == x.numel() * rows,
                  "dbf_native got tensors whose sizes do not fit together");
  bytes_of(x.scalar_type(), "x");
  bytes_of(out.scalar_type(), "out");
  return rows == 0 ? 0 : out.numel() / rows;
}

// Runs on torch's threads; on the calling one alone if there is little to do.
const auto parallel = [](int64_t count, int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, count, grain, body);
};

// Reads rows of x as float32 activations and scales them.
auto reader(const dbf::Kernel& kernel, const Tensor& x, const Vector& scale) {
  const int64_t columns = columns_of(x), stride = columns * bytes_of(x.scalar_type(), "x");
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  return [=, dtype = x.scalar_type(), &kernel, &scale](int64_t token, float* values) {
    to_float(kernel, data + token * stride, dtype, columns, values);
    scale.multiply(values, 0, columns);
  };
}

// Scales sums, adds the bias, and writes them to rows of `out`.
auto writer(const dbf::Kernel& kernel, const Tensor& out, const Vector& scale, const Vector& bias) {
  const int64_t rows = columns_of(out), size = bytes_of(out.scalar_type(), "out");
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  return [=, dtype = out.scalar_type(), &kernel, &scale, &bias](int64_t token, int64_t row, int64_t count,
                                                                float* sums) {
    scale.multiply(sums, row, count);
    bias.add(sums, row, count);
    from_float(kernel, sums, dtype, count, data + (token * rows + row) * size);
  };
}

int bits_of(bool fast) { return fast ? 16 : 24; }

// Memory of the calling thread; later calls reuse it.
struct Workspace {
  dbf::TokenBlock first, second;
  Vector before, between, after, shift;
  dbf::Scratch<float> middle;
};
Workspace& workspace() {
  static thread_local Workspace space;
  return space;
}

Tensor sign_matmul_out(const Tensor& x, const Tensor& signs, std::optional<Tensor> in_scale,
                       std::optional<Tensor> out_scale, std::optional<Tensor> bias, bool interleaved, bool fast,
                       Tensor out) {
  STD_TORCH_CHECK(x.dim() > 0, "dbf_native takes no activations of such sizes: a single number");
  const dbf::Signs matrix = checked_signs(signs, columns_of(x), interleaved);
  const int64_t tokens = checked_tokens(x, out, matrix.columns, matrix.rows), bits = bits_of(fast);
  const dbf::Kernel& kernel = chosen_kernel();
  Workspace& space = workspace();
  space.before.load(kernel, in_scale, matrix.columns, "in_scale");
  space.after.load(kernel, out_scale, matrix.rows, "out_scale");
  space.shift.load(kernel, bias, matrix.rows, "bias");
  const auto read = reader(kernel, x, space.before);
  const auto write = writer(kernel, out, space.after, space.shift);
  const int64_t step = dbf::tokens_per_block(kernel, matrix.columns, bits);
  for (int64_t first = 0; first < tokens; first += step)
    dbf::multiply_block(
        kernel, matrix, bits, std::min(step, tokens - first), space.first, parallel,
        [&](int64_t t, float* values) { read(first + t, values); },
        [&](int64_t t, int64_t row, int64_t count, float* sums) { write(first + t, row, count, sums); });
  return out;
}

Tensor double_binary_linear_out(const Tensor& x, const Tensor& signs_in, const Tensor& signs_out,
                                const Tensor& scale_in, const Tensor& scale_mid, const Tensor& scale_out,
                                std::optional<Tensor> bias, bool interleaved, bool fast, Tensor out) {
  STD_TORCH_CHECK(x.dim() > 0, "dbf_native takes no activations of such sizes: a single number");
  const dbf::Signs inner = checked_signs(signs_in, columns_of(x), interleaved);
  const dbf::Signs outer = checked_signs(signs_out, inner.rows, interleaved);
  const int64_t tokens = checked_tokens(x, out, inner.columns, outer.rows), bits = bits_of(fast), middle = inner.rows;
  const dbf::Kernel& kernel = chosen_kernel();
  Workspace& space = workspace();
  space.before.load(kernel, scale_in, inner.columns, "scale_in");
  space.between.load(kernel, scale_mid, middle, "scale_mid");
  space.after.load(kernel, scale_out, outer.rows, "scale_out");
  space.shift.load(kernel, bias, outer.rows, "bias");
  const auto read = reader(kernel, x, space.before);
  const auto write = writer(kernel, out, space.after, space.shift);
  const int64_t step = std::min(dbf::tokens_per_block(kernel, inner.columns, bits),
                                dbf::tokens_per_block(kernel, middle, bits));
  float* h = space.middle.get(std::min(step, tokens) * middle);
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t count = std::min(step, tokens - first);
    dbf::multiply_block(
        kernel, inner, bits, count, space.first, parallel,
        [&](int64_t t, float* values) { read(first + t, values); },
        [&](int64_t t, int64_t row, int64_t rows, float* sums) {
          std::copy_n(sums, rows, h + t * middle + row);
        });
    dbf::multiply_block(
        kernel, outer, bits, count, space.second, parallel,
        [&](int64_t t, float* values) {
          std::copy_n(h + t * middle, middle, values);
          space.between.multiply(values, 0, middle);
        },
        [&](int64_t t, int64_t row, int64_t rows, float* sums) { write(first + t, row, rows, sums); });
  }
  return out;
}

STABLE_TORCH_LIBRARY(dbf_native, library) {
  library.def(
      "sign_matmul.out(Tensor x, Tensor signs, Tensor? in_scale=None, Tensor? out_scale=None, Tensor? bias=None, "
      "*, bool interleaved=False, bool fast=False, Tensor(a!) out) -> Tensor(a!)");
  library.def(
      "double_binary_linear.out(Tensor x, Tensor signs_in, Tensor signs_out, Tensor scale_in, Tensor scale_mid, "
      "Tensor scale_out, Tensor? bias=None, *, bool interleaved=False, bool fast=False, Tensor(a!) out) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(dbf_native, CPU, library) {
  library.impl("sign_matmul.out", TORCH_BOX(&sign_matmul_out));
  library.impl("double_binary_linear.out", TORCH_BOX(&double_binary_linear_out));
}

}  // namespace

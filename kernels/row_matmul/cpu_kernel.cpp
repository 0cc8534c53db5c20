// The torch operator of the CPU kernels: checks, threads. The product itself is in cpu_product.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../c_functions.h"
#include "cpu_product.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

dbf_rows::Table checked_table(const Tensor& rows, const dbf_rows::Format& format) {
  STD_TORCH_CHECK(format.bits == 8 || format.bits == 6 || format.bits == 4, "dbf_native got a table of ", format.bits,
                  " bits");
  STD_TORCH_CHECK(format.columns > 0 && format.columns <= dbf_rows::kMostColumns, "dbf_native got a table of ",
                  format.columns, " columns");
  STD_TORCH_CHECK(format.group >= 0 && format.group % (format.unit_steps() * dbf_rows::kStep) == 0,
                  "dbf_native got a table with groups of ", format.group, " columns");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Int && rows.is_contiguous() && rows.dim() == 2 &&
                      rows.size(1) == format.words(),
                  "dbf_native got a table and activations whose sizes do not fit together");
  return {static_cast<const uint32_t*>(rows.const_data_ptr()), rows.size(0), format};
}

const dbf_rows::Kernel& chosen_kernel() {
  const dbf_rows::Kernel* chosen = dbf_rows::choose_kernel();
  STD_TORCH_CHECK(chosen != nullptr, "DBF_CPU_ISA=", std::getenv("DBF_CPU_ISA"), "; allowed here: ",
                  dbf_rows::usable_names(), "; unset it for the fastest");
  return *chosen;
}

// Runs on torch's threads; on the calling one alone if there is little to do.
const auto parallel = [](int64_t count, int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, count, grain, body);
};

void to_bfloat16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

Tensor row_matmul_out(const Tensor& x, const Tensor& rows, std::optional<Tensor> bias, int64_t bits, int64_t group,
                      Tensor out) {
  STD_TORCH_CHECK(x.dim() > 0 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "dbf_native needs contiguous float32 activations");
  const int64_t columns = x.size(x.dim() - 1);
  const dbf_rows::Table table = checked_table(rows, {bits, columns, group});
  STD_TORCH_CHECK(out.is_contiguous() && out.dim() == x.dim() && out.size(out.dim() - 1) == table.rows &&
                      out.numel() * columns == x.numel() * table.rows,
                  "dbf_native got tensors whose sizes do not fit together");
  const bool wide = out.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || out.scalar_type() == ScalarType::BFloat16, "dbf_native writes float32 or bfloat16");
  const float* shift = nullptr;
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == table.rows,
                    "dbf_native needs a contiguous float32 bias of one value a row");
    shift = static_cast<const float*>(bias->const_data_ptr());
  }
  const int64_t tokens = table.rows == 0 ? 0 : out.numel() / table.rows;
  const auto* input = static_cast<const float*>(x.const_data_ptr());
  void* output = out.mutable_data_ptr();
  const dbf_rows::Kernel& kernel = chosen_kernel();
  static thread_local dbf_rows::TokenDigits digits;  // later calls reuse its memory
  for (int64_t first = 0; first < tokens; first += dbf_rows::kTokensPerBlock)
    dbf_rows::multiply_tokens(
        kernel, table, input + first * columns, std::min(dbf_rows::kTokensPerBlock, tokens - first), digits, parallel,
        [&](int64_t t, int64_t row, int64_t count, float* sums) {
          if (shift != nullptr)
            for (int64_t i = 0; i < count; ++i) sums[i] += shift[row + i];
          const int64_t place = (first + t) * table.rows + row;
          if (wide)
            std::copy_n(sums, count, static_cast<float*>(output) + place);
          else
            to_bfloat16(sums, count, static_cast<uint16_t*>(output) + place);
        });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dbf_native, library) {
  library.def("row_matmul.out(Tensor x, Tensor rows, Tensor? bias=None, *, int bits, int group, Tensor(a!) out) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(dbf_native, CPU, library) { library.impl("row_matmul.out", TORCH_BOX(&row_matmul_out)); }

}  // namespace

DBF_C_FUNCTION aoti_torch_cpu_row_matmul(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle rows,
                                                    AtenTensorHandle* bias, int64_t bits, int64_t group) {
  row_matmul_out(tensor_of(x), tensor_of(rows), tensor_of(bias), bits, group, tensor_of(out));
  return AOTI_TORCH_SUCCESS;
}

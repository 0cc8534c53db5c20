// The torch operator of attention over a cache on CPUs: checks, dtypes, threads. The product itself is in cpu_product.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../c_functions.h"
#include "cpu_product.h"

namespace {

using namespace dbf_attention;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernel& chosen_kernel() {
  const Kernel* chosen = choose_kernel();
  STD_TORCH_CHECK(chosen != nullptr, "DBF_CPU_ISA=", std::getenv("DBF_CPU_ISA"), "; allowed here: ", usable_names(),
                  "; unset it for the fastest");
  return *chosen;
}

// Runs on torch's threads.
const auto parallel = [](int64_t count, int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, count, grain, body);
};

template <typename T>
void run(const Sizes& sizes, const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& positions,
         Tensor out) {
  const Arrays<T> arrays{static_cast<const T*>(q.const_data_ptr()), static_cast<const T*>(keys.const_data_ptr()),
                         static_cast<const T*>(values.const_data_ptr()),
                         static_cast<const int64_t*>(positions.const_data_ptr()),
                         static_cast<T*>(out.mutable_data_ptr())};
  attend_all(chosen_kernel(), sizes, arrays, parallel);
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
  const auto* at = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t i = 0; i < positions.numel(); ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < length, "dbf_native got the position ", at[i], " in a cache of ", length);
  const Sizes sizes{B,      H,      heads, tokens, q.size(3), values.size(3), length,
                    window, static_cast<float>(scale), static_cast<float>(cap)};
  if (dtype == ScalarType::Float) {
    run<float>(sizes, q, keys, values, positions, out);
  } else if (dtype == ScalarType::BFloat16) {
    run<BFloat16>(sizes, q, keys, values, positions, out);
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half, "dbf_native takes float32, bfloat16 or float16 for attention");
    run<Float16>(sizes, q, keys, values, positions, out);
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

DBF_C_FUNCTION aoti_torch_cpu_cached_attention(AtenTensorHandle out, AtenTensorHandle q, AtenTensorHandle keys,
                                                          AtenTensorHandle values, AtenTensorHandle positions,
                                                          double scale, int64_t window, double cap) {
  cached_attention_out(tensor_of(q), tensor_of(keys), tensor_of(values), tensor_of(positions), scale, window, cap,
                       tensor_of(out));
  return AOTI_TORCH_SUCCESS;
}

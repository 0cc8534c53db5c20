// For the C functions of the operators, which compiled programs call: tensors as the handles of torch's C interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#define DBF_C_FUNCTION extern "C" __attribute__((visibility("default"))) AOTITorchError

namespace {

// Another reference to the caller's tensor.
torch::stable::Tensor tensor_of(AtenTensorHandle handle) {
  AtenTensorHandle own;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &own));
  return torch::stable::Tensor(own);
}

[[maybe_unused]] std::optional<torch::stable::Tensor> tensor_of(const AtenTensorHandle* handle) {
  return handle == nullptr ? std::nullopt : std::optional(tensor_of(*handle));
}

}  // namespace

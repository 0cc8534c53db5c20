// A pretended accelerator: it shows, on a machine without one, whether a program keeps its tensors on one device.
//
// Tensors of the device "hpu" are in the memory of the host. The kernel of the CPU runs every operator, after a check of its
// arguments: as on a GPU, tensors of the device and of the CPU in one call are an error. Exceptions are copies, single
// numbers, and indices.

#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <optional>
#include <utility>
#include <vector>

namespace at {

// The engine of autograd asks whether there is such a device; torch finds this class by its name.
struct HPUHooks : HPUHooksInterface {
  explicit HPUHooks(HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

REGISTER_HPU_HOOKS(HPUHooks)

}  // namespace at

namespace {

constexpr auto kType = c10::DeviceType::HPU;  // a backend that torch has a name for and no code

struct Guard : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {kType, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  // All is done when it has been asked for.
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(HPU, Guard)

void release(void* storage) { delete static_cast<c10::Storage*>(storage); }

// Return a tensor of the same memory that says it is elsewhere.
at::Tensor seen_on(c10::Device where, const at::Tensor& tensor) {
  const auto key = where.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::HPU;
  const auto& memory = tensor.storage();
  c10::DataPtr data(memory.mutable_data(), new c10::Storage(memory), &release, where);
  c10::Storage storage(c10::Storage::use_byte_size_t(), memory.nbytes(), std::move(data), c10::GetAllocator(at::kCPU), true);
  auto moved = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  moved.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return moved;
}

at::Tensor on_cpu(const at::Tensor& tensor) { return tensor.is_cpu() ? tensor : seen_on(at::kCPU, tensor); }
at::Tensor on_device(const at::Tensor& tensor) { return seen_on(c10::Device(kType, 0), tensor); }

struct Call {
  const c10::OperatorHandle& op;
  std::vector<std::pair<at::Tensor, at::Tensor>> seen;  // as the CPU's kernel sees it, and as it is

  at::Tensor lowered(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().is_meta()) return tensor;
    if (tensor.is_cpu()) {
      const bool index = at::isIntegralType(tensor.scalar_type(), true) &&
                         op.schema().name().rfind("aten::index", 0) == 0;
      TORCH_CHECK(tensor.dim() == 0 || index, op.schema().name(), " got a tensor ", tensor.sizes(),
                  " of the CPU beside those of the pretended device");
      return tensor;
    }
    seen.emplace_back(seen_on(at::kCPU, tensor), tensor);
    return seen.back().first;
  }

  at::Tensor raised(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (auto& [cpu, original] : seen)
      if (cpu.is_same(tensor)) return original;
    return on_device(tensor);
  }

  // Outputs that a kernel has given another size have another memory now.
  void give_back_sizes() {
    for (auto& [cpu, original] : seen) {
      if (cpu.sizes() == original.sizes() && cpu.data_ptr() == original.data_ptr()) continue;
      auto* impl = original.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(on_device(cpu).storage());
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

template <typename Change>
c10::IValue changed(const c10::IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      changed.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
    return changed;
  }
  return value;
}

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call{op, {}};
  const auto first = stack->size() - op.schema().arguments().size();
  for (auto place = first; place < stack->size(); ++place) {
    auto& value = (*stack)[place];
    value = value.isDevice() ? c10::IValue(c10::Device(at::kCPU))
                             : changed(value, [&](const at::Tensor& tensor) { return call.lowered(tensor); });
  }
  op.callBoxed(stack);
  call.give_back_sizes();
  const auto results = stack->size() - op.schema().returns().size();
  for (auto place = results; place < stack->size(); ++place)
    (*stack)[place] = changed((*stack)[place], [&](const at::Tensor& tensor) { return call.raised(tensor); });
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return on_device(at::empty(size, at::TensorOptions().dtype(dtype), format));
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return on_device(at::empty_strided(size, stride, at::TensorOptions().dtype(dtype)));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  on_cpu(target).copy_(on_cpu(source));
  return target;
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
}

}  // namespace

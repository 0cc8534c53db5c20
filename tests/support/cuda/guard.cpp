// Lets torch without CUDA enter and leave a device that is not there, as it does around every index of a tensor there.

#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)

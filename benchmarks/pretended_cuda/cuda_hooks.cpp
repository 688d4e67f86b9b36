// Lets autograd of a CPU build of torch walk through nodes whose tensors are on the device "cuda". Nothing is executed.
//
// Three things are missing from a CPU build: CUDA's hooks, its device guard, and a positive answer of `getAccelerator`,
// which is fixed when torch is compiled. The last one is replaced by symbol interposition: this library must be loaded
// with RTLD_GLOBAL before libtorch_cpu.so, so that the dynamic linker finds this definition first.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace accelerator {

std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }

}  // namespace accelerator
}  // namespace at

namespace {

using c10::Device;
using c10::Stream;

struct NoOpCuda : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device first() const { return Device(c10::DeviceType::CUDA, 0); }
  Stream only() const { return Stream(Stream::DEFAULT, first()); }
  Device exchangeDevice(Device) const override { return first(); }
  Device getDevice() const override { return first(); }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, NoOpCuda)

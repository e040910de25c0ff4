// Two CUDA devices that compute nothing, for a PyTorch that was built without CUDA.
//
// Autograd asks a device guard which device it is on, how many there are and which stream is
// current; a CPU build has none for CUDA. This one remembers the device of each thread and answers.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kCount = 2;
constexpr auto kCuda = c10::DeviceType::CUDA;
thread_local c10::DeviceIndex here = 0;

c10::DeviceIndex move_to(c10::DeviceIndex index) noexcept {
  const auto before = here;
  if (index >= 0) here = index;
  return before;
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kCuda; }
  c10::DeviceIndex deviceCount() const noexcept override { return kCount; }
  c10::Device getDevice() const override { return {kCuda, here}; }
  c10::Device exchangeDevice(c10::Device to) const override { return {kCuda, move_to(to.index())}; }
  void setDevice(c10::Device to) const override { move_to(to.index()); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { move_to(to.index()); }
  // one stream a device as far as autograd goes: the order of streams is checked in Python
  c10::Stream getStream(c10::Device of) const override {
    return c10::Stream(
        c10::Stream::DEFAULT, c10::Device(kCuda, of.has_index() ? of.index() : here));
  }
  c10::Stream exchangeStream(c10::Stream with) const override { return getStream(with.device()); }
};

class Hooks final : public at::CUDAHooksInterface {
 public:
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kCount; }
  c10::DeviceIndex deviceCount() const override { return kCount; }
  c10::DeviceIndex current_device() const override { return here; }
  c10::DeviceIndex getCurrentDevice() const override { return here; }
  void setCurrentDevice(c10::DeviceIndex index) const override { move_to(index); }
};

}  // namespace

namespace at {
using StandInHooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, StandInHooks)  // under the name torch looks for
}  // namespace at

extern "C" void register_guard() { c10::impl::DeviceGuardImplRegistrar(kCuda, new Guard); }
extern "C" int current_device() { return here; }
extern "C" void set_device(int index) { move_to(static_cast<c10::DeviceIndex>(index)); }

// The kernels that serve a tensor's device, once Python has told where they are.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <memory>
#include <stdexcept>

#include "ops.h"

namespace taylorkern {

// x is any of the call's tensors: the kernels run where it is. resident_bytes as in ops.h
class Kernels {
 public:
  virtual ~Kernels() = default;
  virtual bool serves(Dtype dtype) const = 0;
  virtual bool takes(const at::Tensor& t) const = 0;
  // Whether dx or dresidual may take the memory of t, a gradient that came in and that nobody else has
  virtual bool writes_over(const at::Tensor& t, const Shape& shape) const = 0;
  virtual void forward(const BatchNormAct& args, const at::Tensor& x, int64_t resident_bytes) const = 0;
  virtual void backward(const BatchNormActBackward& args, const at::Tensor& x, int64_t resident_bytes) const = 0;
  virtual void follow(const RunningStatistics& args, const at::Tensor& x) const = 0;
};

class CpuKernels final : public Kernels {
 public:
  decltype(&cpu::batch_norm_act) run_forward;
  decltype(&cpu::batch_norm_act_backward) run_backward;
  decltype(&cpu::follow) run_follow;

  bool serves(Dtype dtype) const override { return dtype != Dtype::f16; }
  bool takes(const at::Tensor&) const override { return true; }
  // Not where somebody lends the memory to torch
  bool writes_over(const at::Tensor& t, const Shape& shape) const override {
    return whole_lines(shape) && t.storage().data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
  }
  void forward(const BatchNormAct& args, const at::Tensor&, int64_t) const override {
    run_forward(args, at::get_num_threads());
  }
  void backward(const BatchNormActBackward& args, const at::Tensor&, int64_t) const override {
    run_backward(args, at::get_num_threads());
  }
  void follow(const RunningStatistics& args, const at::Tensor&) const override { run_follow(args); }
};

class CudaKernels final : public Kernels {
 public:
  decltype(&cuda::batch_norm_act) run_forward;
  decltype(&cuda::batch_norm_act_backward) run_backward;
  decltype(&cuda::follow) run_follow;
  decltype(&cuda::workspace_bytes) workspace_bytes;
  int32_t (*current_stream)(int32_t device, void** stream);  // of torch; 0 where it went well

  bool serves(Dtype dtype) const override { return dtype != Dtype::f64; }
  // Where 16 bytes can be taken at once: Python brings others there
  bool takes(const at::Tensor& t) const override {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  }
  bool writes_over(const at::Tensor&, const Shape&) const override { return false; }
  void forward(const BatchNormAct& args, const at::Tensor& x, int64_t resident_bytes) const override {
    run(run_forward, args, x, workspace_bytes(args.shape), resident_bytes);
  }
  void backward(const BatchNormActBackward& args, const at::Tensor& x, int64_t resident_bytes) const override {
    run(run_backward, args, x, workspace_bytes(args.shape), resident_bytes);
  }
  void follow(const RunningStatistics& args, const at::Tensor& x) const override { run(run_follow, args, x, 0, 0); }

 private:
  // Torch's allocator gives a freed piece of memory to nobody but the stream that it was asked on, and what is put there
  // later runs later: the workspace may go before the kernels have run.
  template <class Args>
  void run(void (*kernel)(const Args&, const cuda::Launch&), const Args& args, const at::Tensor& x, int64_t bytes,
           int64_t resident_bytes) const {
    const c10::OptionalDeviceGuard here(x.device());
    void* stream = nullptr;
    const int32_t failed = current_stream(x.device().index(), &stream);
    if (failed) throw std::runtime_error("taylorkern: torch tells no CUDA stream");
    const at::Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte));
    kernel(args, {stream, workspace.mutable_data_ptr(), resident_bytes});
  }
};

constexpr auto kDeviceTypes = static_cast<size_t>(c10::COMPILE_TIME_MAX_DEVICE_TYPES);
inline std::array<std::unique_ptr<const Kernels>, kDeviceTypes> kernels_by_device;

inline const Kernels* kernels_of(c10::DeviceType type) { return kernels_by_device.at(static_cast<size_t>(type)).get(); }

}  // namespace taylorkern

// Makes PyTorch allocate its CPU tensors in the executor's device memory, so that each has bounds and a history of its own.
#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>

#include <cstring>
#include <new>

#include "executor.h"

namespace {

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const p = bytes ? simt_allocate(bytes) : nullptr;
    if (bytes && !p) throw std::bad_alloc();
    return {p, p, simt_release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return simt_release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

const bool installed = [] {
  static DeviceMemory memory;
  c10::SetCPUAllocator(&memory, 255);
  return true;
}();

}  // namespace

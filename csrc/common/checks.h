// What every torch.cpp shares: argument checks, launching on either device, registration. The only header here, beside
// the torch.cpp files, that knows PyTorch; it uses the stable ABI alone, so one build serves every later PyTorch.
//
// torch.cpp is compiled once for each device. The CPU build defines the schemas (CONVDIT_SCHEMAS); both implement them
// (CONVDIT_KERNELS). CONVDIT_RUN(room, function, tensor, params) calls the CPU kernel of the level in use, or the CUDA
// launcher on the tensor's device and PyTorch's current stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws with a message that names the argument, what was expected and what came (and no source file, unlike PyTorch's).
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
#define CONVDIT_CHECK(condition, ...)            \
  if (!(condition)) ::convdit::fail(__VA_ARGS__)

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ")";
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline DType dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail(name, ": expected float32, float64, bfloat16 or float16, got ", dtype_name(type));
  }
}
inline DType dtype_of(const char* name, const Tensor& t) { return dtype_of(name, t.scalar_type()); }

// The dtype that per-channel parameters and statistics of x have: float32, or float64 for float64.
inline ScalarType accumulate_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  CONVDIT_CHECK(t.scalar_type() == expected, name, ": expected dtype ", dtype_name(expected), ", got ", dtype_name(t.scalar_type()));
}

inline void check_dim(const char* name, const Tensor& t, int64_t dim, const char* axes) {
  CONVDIT_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions ", axes, ", got shape ", describe(t));
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected.begin()[i];
  if (same) return;
  std::ostringstream wanted;  // made only where it is needed: it costs more than the rest of the checks
  for (const int64_t& size : expected) wanted << (&size == expected.begin() ? "" : ", ") << size;
  fail(name, ": expected shape (", wanted.str(), "), got ", describe(t));
}

inline void check_same_device(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  CONVDIT_CHECK(t.is_cpu() == other.is_cpu() && t.get_device_index() == other.get_device_index(), name, ": expected the device of ",
                other_name, ", got another one");
}

// A per-channel parameter of x: right shape, x's device, of the accumulate dtype or a half beside float32; of the accumulate dtype and
// contiguous on return.
inline Tensor check_parameter(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& x) {
  check_same_device(name, t, "x", x);
  check_shape(name, t, shape);
  const ScalarType wanted = accumulate_dtype(x), got = t.scalar_type();
  const bool half = got == ScalarType::BFloat16 || got == ScalarType::Half;
  if (!half || wanted != ScalarType::Float) check_dtype(name, t, wanted);
  const Tensor wide = half ? torch::stable::to(t, wanted) : t;
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

inline std::optional<Tensor> optional_vector(const char* name, const std::optional<Tensor>& t, int64_t size, const Tensor& x) {
  if (!t) return t;
  return check_parameter(name, *t, {size}, x);
}
inline const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline int32_t shim_dtype(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

// Asks Linux for huge pages under a fresh result. malloc maps large blocks anew, and with small pages the first touch of each 4 KiB
// can take longer than the work of a kernel on it. Whole huge pages inside the tensor alone: no memory beyond it is taken.
inline Tensor in_huge_pages(Tensor t) {
#if defined(__linux__) && !defined(CONVDIT_DEVICE_CUDA)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
  if (bytes < kHugePage || !t.is_cpu()) return t;
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage, end = (start + bytes) / kHugePage * kHugePage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a hint: failing changes nothing
#endif
  return t;
}

// A fresh contiguous tensor. Not new_empty(), whose way through the dispatcher takes several times as long.
inline Tensor allocate_on(int32_t device_type, int32_t device_index, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kMaxDim = 8;
  CONVDIT_CHECK(sizes.size() <= kMaxDim, "tensor: expected at most ", kMaxDim, " dimensions, got ", sizes.size());
  int64_t strides[kMaxDim], next = 1;
  for (size_t i = sizes.size(); i-- > 0; next *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = next;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, shim_dtype(dtype),
                                                         device_type, device_index, &handle));
  return in_huge_pages(Tensor(handle));
}
// On the device of `like`.
inline Tensor allocate_sizes(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return allocate_on(device_type, like.get_device_index(), sizes, dtype);
}
inline Tensor allocate(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  return allocate_sizes({shape.begin(), shape.size()}, dtype, like);
}
inline Tensor allocate_zeros(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_zeros(like, shape, dtype);
}
inline Tensor allocate_like(const Tensor& t) {  // contiguous, whatever t's strides
  return allocate_sizes(t.sizes(), t.scalar_type(), t);
}

inline int64_t bytes_of(ScalarType dtype) {  // of the four dtypes
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Memory that a kernel needs for itself. On a CPU little of it, kFewBytes, lies here, on the stack: a call on few values is mostly
// allocations.
template <int64_t kFewBytes = 16384>
class Workspace {
 public:
#ifdef CONVDIT_DEVICE_CUDA
  Workspace(int64_t count, ScalarType dtype, const Tensor& like) : large_(allocate({count}, dtype, like)) {}
  void* data() { return large_.mutable_data_ptr(); }
#else
  Workspace(int64_t count, ScalarType dtype) {
    const int64_t sizes[] = {count};
    if (count * bytes_of(dtype) > kFewBytes) large_ = allocate_on(aoti_torch_device_type_cpu(), -1, sizes, dtype);
  }
  Workspace(int64_t count, ScalarType dtype, const Tensor&) : Workspace(count, dtype) {}
  void* data() { return large_ ? large_->mutable_data_ptr() : few_; }
#endif
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
#ifdef CONVDIT_DEVICE_CUDA
  Tensor large_;
#else
  alignas(64) char few_[kFewBytes];
  std::optional<Tensor> large_;
#endif
};

// Part of t's memory, from `offset` elements on, as a tensor of another shape that autograd knows nothing of. Each narrow(), transpose() or
// detach() would go through the dispatcher.
template <size_t N>
Tensor view_of(const Tensor& t, const int64_t (&sizes)[N], const int64_t (&strides)[N], int64_t offset = 0) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), N, sizes, strides, offset, &handle));
  return Tensor(handle);
}

// While one lives, this thread is one of several that each take a share of an operator through all its steps: its kernels start no
// threads of their own, as PyTorch's operators start none inside parallel_for.
class OneOfSeveral {
 public:
  OneOfSeveral() : before_(here) { here = true; }
  ~OneOfSeveral() { here = before_; }
  OneOfSeveral(const OneOfSeveral&) = delete;
  OneOfSeveral& operator=(const OneOfSeveral&) = delete;
  static inline thread_local bool here = false;

 private:
  bool before_;
};

// CPU threads: PyTorch's own, as many as torch.get_num_threads() says; tasks are pulled from a counter.
inline Runner torch_runner() {
  if (OneOfSeveral::here) return {nullptr, 1};
  Runner runner;
  runner.threads = torch::stable::get_num_threads();
  runner.run = [](int64_t tasks, Runner::Body body, const void* closure) {
    std::atomic<int64_t> next{0};
    const int64_t threads = torch::stable::get_num_threads();
    torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t, int64_t) {
      for (int64_t task = next.fetch_add(1, std::memory_order_relaxed); task < tasks; task = next.fetch_add(1, std::memory_order_relaxed))
        body(closure, task);
    });
  };
  return runner;
}

}  // namespace convdit


#ifdef CONVDIT_DEVICE_CUDA
#include <cuda_runtime_api.h>
namespace convdit {
// A kernel that this GPU has no code for is an error of the build, not of the call: CONVDIT_CUDA_ARCHS is what was built.
inline void check_launch(int status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction || status == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    fail(what, ": convdit was built for the CUDA architectures ", CONVDIT_CUDA_ARCHS, ", and this GPU, of compute capability ", major, ".",
         minor, ", can use none of them. Rebuild with TORCH_CUDA_ARCH_LIST=", major, ".", minor);
  }
  fail(what, ": CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}
inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
}  // namespace convdit
#endif

// Who defines CONVDIT_RUN on the command line brings a device of its own (tests/simt).
#ifndef CONVDIT_RUN
#ifdef CONVDIT_DEVICE_CUDA
#define CONVDIT_RUN(room, function, tensor, params)                                                              \
  do {                                                                                                           \
    torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index());                                  \
    convdit::check_launch(convdit::cuda::room##_##function(params, convdit::current_stream(tensor)), #function); \
  } while (0)
#define CONVDIT_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(convdit, CUDA, m)
#else
#define CONVDIT_RUN(room, function, tensor, params) convdit::room##_table().function(params, convdit::torch_runner())
#define CONVDIT_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(convdit, m)
#define CONVDIT_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(convdit, CPU, m)
#endif
#endif

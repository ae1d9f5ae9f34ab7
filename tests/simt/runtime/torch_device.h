// Included before each torch.cpp (see csrc/common/checks.h): CPU tensors go to the CUDA launchers, which run on the executor.
// A room without CUDA kernels defines its schemas alone; calling it raises.
#pragma once

#ifdef CONVDIT_DEVICE_CUDA
#define CONVDIT_RUN(room, function, tensor, params) convdit::check_launch(convdit::cuda::room##_##function(params, nullptr), #function)
#define CONVDIT_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(convdit, CPU, m)
#else
#define CONVDIT_RUN(room, function, tensor, params) convdit::room##_table().function(params, convdit::torch_runner())
#define CONVDIT_KERNELS(m) \
  template <class Library> \
  [[maybe_unused]] void without_kernels(Library& m)
#endif
#define CONVDIT_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(convdit, m)

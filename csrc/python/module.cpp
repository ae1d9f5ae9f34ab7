// convdit._C: what was built and what this machine runs. No tensors and no PyTorch symbols, so it always loads.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "common/cpu_level.h"

namespace py = pybind11;

namespace {

py::list split(const std::string& text) {
  py::list parts;
  std::stringstream stream(text);
  for (std::string part; stream >> part;) parts.append(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = CONVDIT_VERSION;
  info["cpu_levels"] = split(CONVDIT_LEVELS);
  info["cpu_level"] = convdit::cpu_level_name(convdit::cpu_level());
  py::list halves;
  if (convdit::multiplies_bf16()) halves.append("bfloat16");
  if (convdit::multiplies_f16()) halves.append("float16");
  info["cpu_halves"] = halves;
  info["cpu_products"] = convdit::own_products() ? "convdit" : "pytorch";
  info["cpu_cache_bytes"] = convdit::cache_bytes();
  info["cuda"] = static_cast<bool>(CONVDIT_CUDA_BUILT);
  info["cuda_reason"] = CONVDIT_CUDA_REASON;
  info["cuda_archs"] = split(CONVDIT_CUDA_ARCHS);
  info["compiler"] = CONVDIT_COMPILER;
  info["torch_target"] = CONVDIT_TORCH_TARGET;
  info["torch_built"] = CONVDIT_TORCH_BUILT;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of convdit's compiled libraries.";
  m.def("build_info", &build_info, "What was compiled, and the CPU level in use on this machine.");
}

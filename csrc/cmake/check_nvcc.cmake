# convdit_check_nvcc(<torch version> <its CUDA version or "none"> <CMAKE_CUDA_ARCHITECTURES>): ends the build, with the
# cure, where the nvcc that will be used is for another CUDA major than PyTorch, or cannot compile for an architecture.
# Asked of nvcc itself and before anything is compiled; an nvcc that does not answer is left to check_language.
function(convdit_check_nvcc torch_version torch_cuda architectures)
  if(DEFINED CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  else()
    set(nvcc "$ENV{CUDACXX}")
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE said ERROR_QUIET RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR NOT said MATCHES "release ([0-9]+)\\.([0-9]+)")
    return()
  endif()
  set(major "${CMAKE_MATCH_1}")
  set(version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  string(REGEX REPLACE "\\..*" "" torch_major "${torch_cuda}")
  if(NOT torch_cuda STREQUAL "none" AND NOT major EQUAL torch_major)
    message(FATAL_ERROR
      "${nvcc} is CUDA ${version}, and PyTorch ${torch_version} is built for CUDA ${torch_cuda}: the major versions must be the same. "
      "Cure: set CUDA_HOME to a CUDA ${torch_major} toolkit; or install a PyTorch for CUDA ${major} and build beside it (pip install "
      "--no-build-isolation); or build for the CPU alone with CONVDIT_CUDA=off")
  endif()

  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    return()
  endif()
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  foreach(architecture IN LISTS architectures)
    string(REGEX MATCH "[0-9]+" number "${architecture}")
    if(NOT number IN_LIST known)
      string(REGEX REPLACE "(.)$" ".\\1" capability "${number}")
      list(JOIN known " " known_names)
      message(FATAL_ERROR
        "TORCH_CUDA_ARCH_LIST: ${nvcc}, CUDA ${version}, does not compile for ${capability}; it knows ${known_names}. "
        "Cure: name other architectures there, or set CUDA_HOME to a toolkit that knows it (the default list needs CUDA 12.8 or later)")
    endif()
  endforeach()
endfunction()

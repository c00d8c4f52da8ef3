# What the library is built on: LibTorch, MPI, CUDA. Sets ANABRANCH_WITH_CUDA.

# The first whose headers all of the project compiles with; launch/setup.sh and pyproject.toml name it too.
set(ANABRANCH_MINIMAL_LIBTORCH 2.8)

# pip builds with the Python that it installs into: its torch is the one, also where pip hides that environment from
# the build, which it does by these two variables.
if(DEFINED SKBUILD AND NOT LibTorch_PYTHON AND NOT LibTorch_ROOT)
  foreach(environment IN ITEMS "" "--unset=PYTHONPATH;--unset=PYTHONNOUSERSITE")
    if(NOT torch_folder)
      execute_process(
        COMMAND "${CMAKE_COMMAND}" -E env ${environment} "${Python_EXECUTABLE}" -c
                "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
        OUTPUT_VARIABLE torch_folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
  endforeach()
  if(NOT torch_folder)
    message(FATAL_ERROR "anabranch is built against the installed torch, and ${Python_EXECUTABLE} has none: pip "
                        "install torch first. A tool that builds in an environment of its own (uv, python -m build) "
                        "needs --no-build-isolation, after pip install scikit-build-core cmake ninja")
  endif()
  set(LibTorch_ROOT "${torch_folder}")
endif()

# The environment that launch/setup.sh makes, unless another Python or LibTorch is named.
if(NOT LibTorch_PYTHON AND NOT DEFINED ENV{VIRTUAL_ENV} AND EXISTS
                                                            "${PROJECT_SOURCE_DIR}/.venv/bin/python")
  set(LibTorch_PYTHON "${PROJECT_SOURCE_DIR}/.venv/bin/python" CACHE FILEPATH "" FORCE)
endif()
find_package(LibTorch ${ANABRANCH_MINIMAL_LIBTORCH} REQUIRED)

set(MPI_CXX_SKIP_MPICXX ON) # MPI's C interface is all there is in MPI 4
if(ANABRANCH_MPI STREQUAL "AUTO")
  find_package(MPI 3.0 QUIET COMPONENTS CXX)
  set(ANABRANCH_MPI ON)
  if(NOT MPI_CXX_FOUND)
    set(ANABRANCH_MPI OFF)
    message(WARNING "WITHOUT MPI: there is none (Debian: libopenmpi-dev). Ranks start by torchrun, or over a process group")
  endif()
elseif(ANABRANCH_MPI)
  find_package(MPI 3.0 REQUIRED COMPONENTS CXX)
endif()

find_package(ZLIB REQUIRED) # checksums of checkpoints

# JSON for Modern C++: headers only, and in none of the public ones.
find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp REQUIRED
          DOC "JSON for Modern C++ (Debian: nlohmann-json3-dev)")
mark_as_advanced(NLOHMANN_JSON_INCLUDE_DIR)
add_library(anabranch_json INTERFACE)
target_include_directories(anabranch_json SYSTEM INTERFACE "${NLOHMANN_JSON_INCLUDE_DIR}")

set(ANABRANCH_WITH_CUDA OFF)
set(ANABRANCH_WHY_NO_CUDA "") # `anabranch info` says it too
if(NOT ANABRANCH_CUDA)
  set(ANABRANCH_WHY_NO_CUDA "ANABRANCH_CUDA was ${ANABRANCH_CUDA}")
else()
  include(CheckLanguage)
  # nvcc's own choice would be the first g++ in PATH.
  if(NOT DEFINED CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "What nvcc compiles host code with")
  endif()
  find_program(ANABRANCH_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_PATH PATH_SUFFIXES bin)
  mark_as_advanced(ANABRANCH_NVCC)
  if(CMAKE_VERSION VERSION_GREATER_EQUAL 3.25.2)
    check_language(CUDA)
  endif()
  if(NOT LibTorch_CUDA_FOUND)
    set(ANABRANCH_WHY_NO_CUDA "LibTorch in ${LibTorch_INCLUDE_DIR} has no CUDA")
  elseif(CMAKE_VERSION VERSION_LESS 3.25.2)
    set(ANABRANCH_WHY_NO_CUDA "CMake ${CMAKE_VERSION} knows no C++20 for nvcc: take 3.25.2 or newer (pip install cmake)")
  elseif(NOT CMAKE_CUDA_COMPILER AND ANABRANCH_NVCC)
    set(ANABRANCH_WHY_NO_CUDA "${ANABRANCH_NVCC} with ${CMAKE_CUDA_HOST_COMPILER} cannot compile a program")
  elseif(NOT CMAKE_CUDA_COMPILER)
    set(ANABRANCH_WHY_NO_CUDA "there is no CUDA compiler (nvcc)")
  else()
    find_package(CUDAToolkit REQUIRED)
    set(major ${CUDAToolkit_VERSION_MAJOR})
    # One process has one CUDA runtime, torch's; within a major version it runs what an older or newer nvcc compiled.
    if(LibTorch_CUDA_VERSION AND NOT LibTorch_CUDA_VERSION MATCHES "^${major}\\.")
      set(ANABRANCH_WHY_NO_CUDA
          "nvcc is of CUDA ${CUDAToolkit_VERSION}, LibTorch of ${LibTorch_CUDA_VERSION}: they must be of one major version")
    else()
      set(ANABRANCH_WITH_CUDA ON)
      set(ANABRANCH_CUDA_VERSION "${CUDAToolkit_VERSION}")
    endif()
  endif()
  if(ANABRANCH_WHY_NO_CUDA AND NOT ANABRANCH_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "ANABRANCH_CUDA is ${ANABRANCH_CUDA}, but ${ANABRANCH_WHY_NO_CUDA}")
  elseif(ANABRANCH_WHY_NO_CUDA AND ANABRANCH_NVCC AND LibTorch_CUDA_FOUND)
    message(WARNING "WITHOUT CUDA, for the CPU alone: ${ANABRANCH_WHY_NO_CUDA}")
  elseif(ANABRANCH_WHY_NO_CUDA)
    message(STATUS "Without CUDA: ${ANABRANCH_WHY_NO_CUDA}")
  endif()
endif()
if(ANABRANCH_WITH_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90 CACHE STRING "GPU architectures to compile for")
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY None) # the one that torch loads, below
  enable_language(CUDA)
  # What it links, the library links too.
  if(CMAKE_CUDA_HOST_COMPILER AND NOT CMAKE_CUDA_HOST_COMPILER STREQUAL CMAKE_CXX_COMPILER)
    check_standard_library("${CMAKE_CUDA_HOST_COMPILER}" "" CUDAHOSTCXX)
  endif()
  # cuBLAS, the runtime and NCCL: those that torch's wheel brings, and loads, before any other.
  set(of_torch "${LibTorch_INCLUDE_DIR}/../../nvidia")
  foreach(library cublas cublasLt cudart)
    find_library(
      ANABRANCH_${library} NAMES lib${library}.so.${major} ${library} REQUIRED
      HINTS "${of_torch}/cu${major}/lib" "${of_torch}/cublas/lib" ${CUDAToolkit_LIBRARY_DIR})
    mark_as_advanced(ANABRANCH_${library})
  endforeach()
  add_library(anabranch_cuda INTERFACE)
  target_include_directories(anabranch_cuda SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
  target_link_libraries(anabranch_cuda INTERFACE "${ANABRANCH_cublas}" "${ANABRANCH_cublasLt}"
                                                 "${ANABRANCH_cudart}")
  find_path(NCCL_INCLUDE_DIR nccl.h HINTS "${of_torch}/nccl/include")
  find_library(NCCL_LIBRARY NAMES libnccl.so.2 nccl HINTS "${of_torch}/nccl/lib")
  mark_as_advanced(NCCL_INCLUDE_DIR NCCL_LIBRARY)
endif()
set(ANABRANCH_WITH_NCCL OFF)
if(ANABRANCH_WITH_CUDA AND NCCL_INCLUDE_DIR AND NCCL_LIBRARY)
  set(ANABRANCH_WITH_NCCL ON)
endif()

message(STATUS "LibTorch ${LibTorch_VERSION} (CUDA: ${LibTorch_CUDA_FOUND}, C++11 ABI: "
               "${LibTorch_CXX11_ABI}): ${LibTorch_CPU_LIBRARY}")
message(STATUS "anabranch: MPI ${ANABRANCH_MPI}, CUDA ${ANABRANCH_WITH_CUDA}, "
               "NCCL ${ANABRANCH_WITH_NCCL}")

# What the library is built on: LibTorch, MPI, CUDA. Sets ANABRANCH_WITH_CUDA.

# The first whose headers all of the project compiles with; launch/setup.sh and pyproject.toml name it too.
set(ANABRANCH_MINIMAL_LIBTORCH 2.8)

# pip builds with the Python that it installs into: its torch is the one.
if(DEFINED SKBUILD AND NOT LibTorch_PYTHON AND NOT LibTorch_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    RESULT_VARIABLE without_torch)
  if(without_torch)
    message(FATAL_ERROR "anabranch is built against the installed torch, and ${Python_EXECUTABLE} has "
                        "none: pip install torch scikit-build-core, then build with "
                        "--no-build-isolation")
  endif()
  set(LibTorch_PYTHON "${Python_EXECUTABLE}")
endif()

# The environment that launch/setup.sh makes, unless another Python or LibTorch is named.
if(NOT LibTorch_PYTHON AND NOT DEFINED ENV{VIRTUAL_ENV} AND EXISTS
                                                            "${PROJECT_SOURCE_DIR}/.venv/bin/python")
  set(LibTorch_PYTHON "${PROJECT_SOURCE_DIR}/.venv/bin/python" CACHE FILEPATH "" FORCE)
endif()
find_package(LibTorch ${ANABRANCH_MINIMAL_LIBTORCH} REQUIRED)

if(ANABRANCH_MPI)
  set(MPI_CXX_SKIP_MPICXX ON) # MPI's C interface is all there is in MPI 4
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
if(ANABRANCH_CUDA)
  include(CheckLanguage)
  # nvcc's own choice would be the first g++ in PATH.
  if(NOT DEFINED CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "What nvcc compiles host code with")
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(why "there is no CUDA compiler")
  elseif(NOT LibTorch_CUDA_FOUND)
    set(why "LibTorch in ${LibTorch_INCLUDE_DIR} has no CUDA")
  else()
    if(CMAKE_VERSION VERSION_LESS 3.25.2)
      message(FATAL_ERROR "CMake ${CMAKE_VERSION} knows no C++20 for nvcc: take 3.25.2 or newer, such as "
                          "that of pip install cmake, or ANABRANCH_CUDA=OFF")
    endif()
    find_package(CUDAToolkit REQUIRED)
    set(major ${CUDAToolkit_VERSION_MAJOR})
    # One process has one CUDA runtime: torch's.
    if(LibTorch_CUDA_VERSION AND NOT LibTorch_CUDA_VERSION MATCHES "^${major}\\.")
      set(why "nvcc is of CUDA ${CUDAToolkit_VERSION}, LibTorch of ${LibTorch_CUDA_VERSION}")
    else()
      set(ANABRANCH_WITH_CUDA ON)
    endif()
  endif()
  if(NOT ANABRANCH_WITH_CUDA)
    if(NOT ANABRANCH_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "ANABRANCH_CUDA is ${ANABRANCH_CUDA}, but ${why}")
    endif()
    message(STATUS "Without CUDA: ${why}")
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

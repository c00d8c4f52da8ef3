# FindLibTorch: the headers and shared libraries of an installed LibTorch, as imported targets.
#
# torch's own TorchConfig.cmake refuses to configure a CUDA build of torch (which PyPI's wheel is)
# where there is no CUDA toolkit, and replaces the project's CUDA architectures where there is one.
# This module only finds files. It looks in this order:
#
#   LibTorch_ROOT      a cache or environment variable: an unpacked LibTorch, or .../site-packages/torch
#   CMAKE_PREFIX_PATH  the same, or torch's own torch.utils.cmake_prefix_path
#   LibTorch_PYTHON    a Python interpreter that has torch; by default the one of an active virtual
#                      environment, then python3
#   the system's paths
#
# Component CUDA asks for the part of torch that runs on NVIDIA GPUs.
#
#   LibTorch::CPU      torch_cpu and c10: all that a CPU program needs, with any build of torch
#   LibTorch::CUDA     torch_cuda and c10_cuda besides; there when the component is, and found
#   LibTorch_VERSION, LibTorch_ROOT_FOUND, LibTorch_CUDA_FOUND, LibTorch_CUDA_VERSION,
#   LibTorch_CXX11_ABI

include(FindPackageHandleStandardArgs)

# Sets OUTPUT to the folder of the torch package that PYTHON would import, or to nothing. It does not
# import torch, which would take seconds.
function(_libtorch_ask_python python output)
  execute_process(
    COMMAND "${python}" -c
            "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    set(folder "")
  endif()
  set(${output} "${folder}" PARENT_SCOPE)
endfunction()

set(LibTorch_PYTHON "" CACHE FILEPATH "A Python interpreter whose torch is to be used")
set(_libtorch_header torch/csrc/api/include/torch/torch.h)

# What was found earlier may be gone: a virtual environment made anew, another LibTorch_ROOT.
if(LibTorch_INCLUDE_DIR AND NOT EXISTS "${LibTorch_INCLUDE_DIR}/${_libtorch_header}")
  foreach(_variable INCLUDE_DIR CPU_LIBRARY C10_LIBRARY CUDA_LIBRARY C10_CUDA_LIBRARY)
    unset(LibTorch_${_variable} CACHE)
  endforeach()
endif()

set(_libtorch_hints "")
if(NOT LibTorch_INCLUDE_DIR)
  foreach(_python IN ITEMS "${LibTorch_PYTHON}" "$ENV{VIRTUAL_ENV}/bin/python" python3)
    if(_python AND NOT _libtorch_hints)
      _libtorch_ask_python("${_python}" _libtorch_hints)
    endif()
  endforeach()
  if(LibTorch_PYTHON AND NOT EXISTS "${LibTorch_PYTHON}")
    message(WARNING "LibTorch_PYTHON is ${LibTorch_PYTHON}, which does not exist")
  endif()
endif()

# ../../include: from torch.utils.cmake_prefix_path, which is torch/share/cmake.
find_path(LibTorch_INCLUDE_DIR ${_libtorch_header} HINTS ${_libtorch_hints}
          PATH_SUFFIXES include ../../include)
get_filename_component(_libtorch_prefix "${LibTorch_INCLUDE_DIR}" DIRECTORY)

# The libraries that lie beside those headers, not the first of that name on the machine.
foreach(_pair IN ITEMS CPU_LIBRARY:torch_cpu C10_LIBRARY:c10 CUDA_LIBRARY:torch_cuda
                       C10_CUDA_LIBRARY:c10_cuda)
  string(REPLACE ":" ";" _pair "${_pair}")
  list(GET _pair 0 _variable)
  list(GET _pair 1 _name)
  if(LibTorch_INCLUDE_DIR)
    find_library(LibTorch_${_variable} ${_name} NO_DEFAULT_PATH
                 HINTS "${_libtorch_prefix}/lib" "${_libtorch_prefix}/lib64"
                       "${_libtorch_prefix}/lib/${CMAKE_LIBRARY_ARCHITECTURE}")
  endif()
  mark_as_advanced(LibTorch_${_variable})
endforeach()
mark_as_advanced(LibTorch_INCLUDE_DIR)

# The version: the header moved in 2.10.
set(LibTorch_VERSION "")
if(LibTorch_INCLUDE_DIR)
  foreach(_header torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(NOT LibTorch_VERSION AND EXISTS "${LibTorch_INCLUDE_DIR}/${_header}")
      file(STRINGS "${LibTorch_INCLUDE_DIR}/${_header}" _lines
           REGEX "^#define TORCH_VERSION_(MAJOR|MINOR|PATCH) +[0-9]+")
      string(REGEX MATCHALL "[0-9]+" _numbers "${_lines}")
      list(JOIN _numbers "." LibTorch_VERSION)
    endif()
  endforeach()
endif()

# The CUDA it was built for; empty where nothing says so.
set(LibTorch_CUDA_VERSION "")
if(LibTorch_INCLUDE_DIR AND EXISTS "${_libtorch_prefix}/version.py")
  file(STRINGS "${_libtorch_prefix}/version.py" _line REGEX "^cuda.*= *'[0-9.]+'")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" LibTorch_CUDA_VERSION "${_line}")
endif()

# Which std::string its binaries use. A constructor that every torch exports says so in its name.
set(LibTorch_CXX11_ABI 1)
if(LibTorch_C10_LIBRARY)
  file(STRINGS "${LibTorch_C10_LIBRARY}" _old_abi LIMIT_COUNT 1
       REGEX "^_ZN3c105ErrorC[12]ENS_14SourceLocationESs")
  if(_old_abi)
    set(LibTorch_CXX11_ABI 0)
  endif()
endif()

set(LibTorch_CUDA_FOUND FALSE)
if(LibTorch_CUDA_LIBRARY AND LibTorch_C10_CUDA_LIBRARY)
  set(LibTorch_CUDA_FOUND TRUE)
endif()

find_package_handle_standard_args(
  LibTorch
  REQUIRED_VARS LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  HANDLE_COMPONENTS
  REASON_FAILURE_MESSAGE
    "
No LibTorch was found that fits. launch/setup.sh installs one into .venv. Or name one of your own:
  -D LibTorch_ROOT=/path/to/libtorch            an unpacked LibTorch, CPU-only or CUDA
  -D LibTorch_PYTHON=/path/to/bin/python        a Python that has torch
  -D CMAKE_PREFIX_PATH=/path/to/libtorch        the same as LibTorch_ROOT
and, where an older one is remembered in the build folder, configure with --fresh.
")

if(LibTorch_FOUND AND NOT TARGET LibTorch::CPU)
  function(_libtorch_library name location)
    add_library(LibTorch::${name} SHARED IMPORTED)
    set_target_properties(
      LibTorch::${name}
      PROPERTIES IMPORTED_LOCATION "${location}"
                 INTERFACE_INCLUDE_DIRECTORIES
                   "${LibTorch_INCLUDE_DIR};${LibTorch_INCLUDE_DIR}/torch/csrc/api/include")
    if(NOT LibTorch_CXX11_ABI)
      set_property(TARGET LibTorch::${name} PROPERTY INTERFACE_COMPILE_DEFINITIONS
                                                     _GLIBCXX_USE_CXX11_ABI=0)
    endif()
  endfunction()

  _libtorch_library(c10 "${LibTorch_C10_LIBRARY}")
  _libtorch_library(torch_cpu "${LibTorch_CPU_LIBRARY}")
  add_library(LibTorch::CPU INTERFACE IMPORTED)
  target_link_libraries(LibTorch::CPU INTERFACE LibTorch::torch_cpu LibTorch::c10)

  # Clang 18 gave constrained templates other names (Itanium C++ ABI, "Tn"), which torch's binaries, by g++, do not have.
  target_compile_options(
    LibTorch::CPU
    INTERFACE
      $<$<AND:$<COMPILE_LANG_AND_ID:CXX,Clang>,$<VERSION_GREATER_EQUAL:$<CXX_COMPILER_VERSION>,18>>:-fclang-abi-compat=17>)

  # at::parallel_for is a template that runs on one core unless the including file is compiled with
  # OpenMP. Its runtime must be the one that torch loads, or there are two pools of threads: of GNU's, for which Clang
  # generates no code. (LLVM's beside it would be asked for threads whose numbers GNU's tells: loops would lose parts.)
  if(EXISTS "${LibTorch_INCLUDE_DIR}/ATen/Config.h")
    file(STRINGS "${LibTorch_INCLUDE_DIR}/ATen/Config.h" _libtorch_openmp
         REGEX "define AT_PARALLEL_OPENMP 1")
    if(_libtorch_openmp AND CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
      message(WARNING "With Clang the library's own loops on a CPU run on one core: torch's OpenMP is GNU's. Its matrix "
                      "products are torch's, on all cores.")
    elseif(_libtorch_openmp)
      target_compile_options(LibTorch::CPU INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
      file(GLOB _libtorch_gomp "${_libtorch_prefix}/lib/libgomp*.so*")
      if(_libtorch_gomp)
        list(GET _libtorch_gomp 0 _libtorch_gomp)
        add_library(LibTorch::openmp SHARED IMPORTED)
        set_target_properties(LibTorch::openmp PROPERTIES IMPORTED_LOCATION "${_libtorch_gomp}")
        target_link_libraries(LibTorch::CPU INTERFACE LibTorch::openmp)
      else()
        target_link_libraries(LibTorch::CPU INTERFACE -fopenmp)
      endif()
    endif()
  endif()

  if(LibTorch_CUDA_FOUND)
    _libtorch_library(c10_cuda "${LibTorch_C10_CUDA_LIBRARY}")
    _libtorch_library(torch_cuda "${LibTorch_CUDA_LIBRARY}")
    add_library(LibTorch::CUDA INTERFACE IMPORTED)
    # Its kernels register themselves when it is loaded; no symbol of it need be called. Its libraries
    # may name the driver's, which a machine that only builds does not have.
    target_link_libraries(LibTorch::CUDA INTERFACE LibTorch::torch_cuda LibTorch::c10_cuda
                                                   LibTorch::CPU)
    target_link_options(LibTorch::CUDA INTERFACE LINKER:--no-as-needed
                                                  LINKER:--allow-shlib-undefined)
  endif()
endif()

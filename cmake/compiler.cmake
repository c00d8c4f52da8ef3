# How the project's own code is compiled. `anabranch_options` is linked PRIVATE by every target of
# the project and never exported: who uses the library keeps their own flags.

option(ANABRANCH_WERROR "Warnings are errors in the project's own code" OFF)
set(ANABRANCH_SANITIZE "" CACHE STRING "Sanitizers: \"address,undefined\", \"thread\", or nothing")

# Flags for C++ only: nvcc has others.
add_library(anabranch_options INTERFACE)
function(anabranch_add_flags)
  target_compile_options(anabranch_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${ARGN}>")
endfunction()

target_compile_features(anabranch_options INTERFACE cxx_std_20)
anabranch_add_flags(-Wall -Wextra -Wpedantic)
if(ANABRANCH_WERROR)
  anabranch_add_flags(-Werror)
endif()
if(CMAKE_UNITY_BUILD AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # The first takes sources that are included for headers; the second, of g++ 12, sees what is not there where more
  # is inlined. Builds source by source have both.
  anabranch_add_flags(-Wno-subobject-linkage -Wno-array-bounds)
endif()
# The same flag for libraries and executables, so that they share the precompiled header.
anabranch_add_flags(-fPIC)
# Messages that name a source file name it from the project's folder.
anabranch_add_flags("-fmacro-prefix-map=${PROJECT_SOURCE_DIR}/=")

if(ANABRANCH_SANITIZE)
  # Instrumented, code of g++ 12's own <regex> seems to use what it has not set.
  anabranch_add_flags(-fsanitize=${ANABRANCH_SANITIZE} -fno-omit-frame-pointer
                      -Wno-maybe-uninitialized)
  target_link_options(anabranch_options INTERFACE -fsanitize=${ANABRANCH_SANITIZE})
  if(ANABRANCH_SANITIZE MATCHES "undefined")
    # vptr needs type information that LibTorch does not export for every class.
    anabranch_add_flags(-fno-sanitize=vptr -fno-sanitize-recover=undefined)
  endif()
endif()

# LibTorch's headers cost a core 14 s and more in every file. They are parsed once, here, and all of
# the project's targets take the result. No more than what most files need: all of <torch/torch.h>
# would double what it costs to use the result.
add_library(anabranch_pch OBJECT "${CMAKE_CURRENT_LIST_DIR}/pch.cpp")
target_link_libraries(anabranch_pch PRIVATE anabranch_options LibTorch::CPU)
target_precompile_headers(anabranch_pch PRIVATE <torch/types.h> <torch/nn/module.h>)

# What every target of the project has in common.
function(anabranch_own_target target)
  target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:anabranch_options>)
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/src")
  target_precompile_headers(${target} REUSE_FROM anabranch_pch)
endfunction()

# ccache, where there is one. gcc writes other bytes each time it makes the same precompiled header:
# what it was made from stands for it (the .sum file). The header itself is too large to be cached.
find_program(ANABRANCH_CCACHE ccache DOC "ccache, to speed up clean builds")
mark_as_advanced(ANABRANCH_CCACHE)
if(ANABRANCH_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER
      "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros CCACHE_DEPEND=1
      CCACHE_PCH_EXTSUM=1 "CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}" "${ANABRANCH_CCACHE}")
  if(NOT CMAKE_CUDA_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env
                                     "CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}" "${ANABRANCH_CCACHE}")
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    anabranch_add_flags(-fpch-preprocess)
    get_target_property(headers anabranch_pch PRECOMPILE_HEADERS)
    file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/CMakeFiles/anabranch_pch.dir/cmake_pch.hxx.gch.sum"
         CONTENT "${CMAKE_CXX_COMPILER_VERSION} LibTorch ${LibTorch_VERSION} ${headers}\n")
  endif()
endif()

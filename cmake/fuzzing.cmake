# The parsers of tests/fuzz under libFuzzer: fuzz_datagram, fuzz_safetensors, ... and `fuzz`, all of them.
# Each is the parsers' own sources alone, so that all their code is instrumented; LibTorch is not.

if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang" OR CMAKE_CXX_COMPILER_VERSION VERSION_LESS 15)
  message(FATAL_ERROR "ANABRANCH_FUZZ needs clang 15 or newer and its libFuzzer (Debian: clang-16 "
                      "libclang-rt-16-dev): -D CMAKE_CXX_COMPILER=clang++-16")
endif()

set(flags -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize=vptr
          -fno-sanitize-recover=undefined -g)
add_library(
  anabranch_fuzzed OBJECT
  fuzz/targets.cpp
  "${PROJECT_SOURCE_DIR}/python_bindings/operators/options.cpp"
  "${PROJECT_SOURCE_DIR}/src/checkpoint/file.cpp"
  "${PROJECT_SOURCE_DIR}/src/checkpoint/index.cpp"
  "${PROJECT_SOURCE_DIR}/src/checkpoint/safetensors.cpp"
  "${PROJECT_SOURCE_DIR}/src/communicator/nccl/datagram.cpp")
target_link_libraries(anabranch_fuzzed PUBLIC anabranch_options anabranch_json LibTorch::CPU ZLIB::ZLIB)
target_include_directories(
  anabranch_fuzzed PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/include"
                          "${PROJECT_SOURCE_DIR}/src")
target_compile_options(anabranch_fuzzed PRIVATE ${flags})

add_custom_target(fuzz)
foreach(target datagram safetensors index options)
  add_executable(fuzz_${target} fuzz/libfuzzer.cpp)
  target_link_libraries(fuzz_${target} PRIVATE anabranch_fuzzed)
  target_compile_definitions(fuzz_${target} PRIVATE ANABRANCH_FUZZ_TARGET="${target}")
  target_compile_options(fuzz_${target} PRIVATE ${flags})
  target_link_options(fuzz_${target} PRIVATE -fsanitize=fuzzer,address,undefined)
  add_dependencies(fuzz fuzz_${target})
endforeach()

# LibTorch and the project share one C++ library, libstdc++.so. A compiler that puts its own into every
# shared library builds one that crashes where the two meet, in the first stream: refused.

# `compiler` with `flags`; `variable` is where a user names it.
function(check_standard_library compiler flags variable)
  set(source "${CMAKE_BINARY_DIR}/CMakeFiles/standard_library.cpp")
  set(library "${CMAKE_BINARY_DIR}/CMakeFiles/standard_library.so")
  file(WRITE "${source}" "#include <iostream>\nvoid tell(long number) { std::cout << number; }\n")
  separate_arguments(flags NATIVE_COMMAND "${flags}")
  execute_process(
    COMMAND "${compiler}" ${flags} -fPIC -shared "${source}" -o "${library}"
    RESULT_VARIABLE status ERROR_VARIABLE errors)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${compiler} cannot make a shared library:\n${errors}")
  endif()
  file(STRINGS "${library}" needed REGEX "^libstdc\\+\\+\\.so" LIMIT_COUNT 1)
  if(NOT needed)
    message(FATAL_ERROR
      "${compiler} links its own copy of the C++ library into shared libraries, but LibTorch uses "
      "libstdc++.so: the two in one process crash. Take another compiler, such as "
      "${variable}=/usr/bin/g++, or leave out -static-libstdc++.")
  endif()
endfunction()

check_standard_library("${CMAKE_CXX_COMPILER}" "${CMAKE_CXX_FLAGS} ${CMAKE_SHARED_LINKER_FLAGS}" CXX)

# Installs the build in BUILD into an empty prefix, builds the project beside this file against it, and
# runs that:  cmake -D BUILD=... -D WORK=... -D GENERATOR=... -D COMPILER=... -P run.cmake

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${WORK}")
run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/prefix")
# What is installed is whole in itself: loaded by nobody who knows where LibTorch is.
file(GLOB library "${WORK}/prefix/lib*/libanabranch.so")
execute_process(COMMAND ldd "${library}" OUTPUT_VARIABLE needed COMMAND_ERROR_IS_FATAL ANY)
if(needed MATCHES "not found")
  message(FATAL_ERROR "${library} does not find what it needs:\n${needed}")
endif()
run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${WORK}/build" -G "${GENERATOR}"
    -D "CMAKE_MAKE_PROGRAM=${MAKE_PROGRAM}" -D "CMAKE_CXX_COMPILER=${COMPILER}"
    -D "CMAKE_CXX_FLAGS=${FLAGS}" -D "CMAKE_PREFIX_PATH=${WORK}/prefix")
run("${CMAKE_COMMAND}" --build "${WORK}/build")
run("${WORK}/build/consumer")

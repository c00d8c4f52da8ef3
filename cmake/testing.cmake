# Tests, as CTest sees them.
#
#   anabranch_test(NAME [CPU_ONLY | CUDA_ONLY] SOURCES file... [RANKS n...] [CUDA_RANKS n...]
#                  [COMMUNICATORS name...] [LABELS label...] [TIMEOUT seconds])
#     Builds one GoogleTest program of the files, with the project's own main, and runs all of it on
#     each number of ranks (default 1 2 3 4): CTest's NAME.np1, NAME.np2, ... In a build with CUDA
#     each of CUDA_RANKS (default: those of 1 2 4 in RANKS) is a test NAME.cuda.npN besides, labelled
#     gpu, which is skipped where there is no GPU. COMMUNICATORS: others than the usual one to run on
#     3 ranks as well; mpi, nccl alone, and those of them but store, on 2 with tensors in GPU memory.
#
#   TIMEOUT, by default 600 s and of scripts 1800 s, is for what hangs: a shared machine can be a third as fast as an idle one.
#
#   anabranch_script_test(NAME COMMAND argument... [LABELS label...] [TIMEOUT seconds] [COST seconds]
#                         [ENVIRONMENT variable=value...])
#     Runs a command from the project's folder. COST: about how long, where that is more than 20 s on two cores. In a
#     build folder that has run no test yet the costliest start first, and none is left over for the end.

find_package(GTest QUIET)
if(NOT GTest_FOUND OR NOT LibTorch_CXX11_ABI)
  # Debian's sources of GoogleTest: also the way to have it with the std::string of an older torch.
  set(ANABRANCH_GTEST_SOURCE /usr/src/googletest CACHE PATH "Sources of GoogleTest")
  if(NOT EXISTS "${ANABRANCH_GTEST_SOURCE}/CMakeLists.txt")
    message(FATAL_ERROR "GoogleTest is missing (Debian: libgtest-dev libgmock-dev); name its prefix "
                        "in CMAKE_PREFIX_PATH, its sources in ANABRANCH_GTEST_SOURCE, or build with "
                        "-D ANABRANCH_TESTS=OFF")
  endif()
  set(INSTALL_GTEST OFF)
  if(NOT LibTorch_CXX11_ABI)
    add_compile_definitions(_GLIBCXX_USE_CXX11_ABI=0)
  endif()
  add_subdirectory("${ANABRANCH_GTEST_SOURCE}" "${CMAKE_BINARY_DIR}/googletest" EXCLUDE_FROM_ALL)
  foreach(library gtest gmock)
    if(NOT TARGET GTest::${library})
      add_library(GTest::${library} ALIAS ${library})
    endif()
  endforeach()
endif()

cmake_host_system_information(RESULT ANABRANCH_CORES QUERY NUMBER_OF_LOGICAL_CORES)

# How ranks are started here. More ranks than cores, and bound to none: several tests run at once.
set(ANABRANCH_MPIEXEC_FLAGS "" CACHE STRING "Flags of mpiexec in the tests (default: as it needs)")
set(mpiexec_flags ${ANABRANCH_MPIEXEC_FLAGS})
set(test_environment
    OMP_NUM_THREADS=1
    "LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/sanitizers/leaks.txt:print_suppressions=0:leak_check_at_exit=0:use_tls=0"
    "UBSAN_OPTIONS=print_stacktrace=1"
    "TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/sanitizers/threads.txt")
if(ANABRANCH_SANITIZE STREQUAL "thread")
  list(APPEND test_environment "GTEST_FILTER=-ProcessGroup*") # see threads.txt
endif()
if(ANABRANCH_MPI)
  execute_process(COMMAND "${MPIEXEC_EXECUTABLE}" --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(version MATCHES "Open MPI|OpenRTE")
    if(NOT mpiexec_flags)
      set(mpiexec_flags --oversubscribe --bind-to none)
    endif()
    # Ranks that wait give their core to those that work. Reading each other's memory needs a right
    # that containers withhold.
    list(APPEND test_environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
         OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none)
  endif()
endif()

# Several ranks on one GPU: NCCL 2.30.3 and newer can, when it is told so. They take turns on it, so
# tests that wait for each other's ranks do not run beside others.
set(cuda_environment NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=8)

# One program on that many ranks as CTest's NAME.
function(anabranch_add_ranks name program ranks)
  cmake_parse_arguments(PARSE_ARGV 3 arg "" "TIMEOUT" "ARGUMENTS;LABELS;ENVIRONMENT;RESOURCE_LOCK")
  if(ANABRANCH_MPI)
    set(command "${MPIEXEC_EXECUTABLE}" ${mpiexec_flags} ${MPIEXEC_NUMPROC_FLAG} ${ranks}
                $<TARGET_FILE:${program}>)
  elseif(ranks EQUAL 1)
    set(command ${program})
  else()
    return()
  endif()
  set(processors ${ranks})
  if(processors GREATER ANABRANCH_CORES)
    set(processors ${ANABRANCH_CORES})
  endif()
  add_test(NAME ${name} COMMAND ${command} ${arg_ARGUMENTS})
  set_tests_properties(
    ${name}
    PROPERTIES ENVIRONMENT "${test_environment};${arg_ENVIRONMENT}" PROCESSORS ${processors}
               TIMEOUT ${arg_TIMEOUT} LABELS "np${ranks};${arg_LABELS}"
               SKIP_REGULAR_EXPRESSION "no test was run: " RESOURCE_LOCK "${arg_RESOURCE_LOCK}")
endfunction()

function(anabranch_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "CPU_ONLY;CUDA_ONLY" "TIMEOUT"
                        "SOURCES;RANKS;CUDA_RANKS;COMMUNICATORS;LABELS")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_SOURCES)
    message(FATAL_ERROR "anabranch_test(${name}): no SOURCES, or unknown: ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_RANKS)
    set(arg_RANKS 1 2 3 4)
  endif()
  if(NOT arg_CUDA_RANKS)
    foreach(ranks IN ITEMS 1 2 4)
      if(ranks IN_LIST arg_RANKS)
        list(APPEND arg_CUDA_RANKS ${ranks})
      endif()
    endforeach()
  endif()
  if(arg_CUDA_ONLY)
    set(arg_RANKS "")
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 600)
  endif()

  add_executable(${name} ${arg_SOURCES})
  anabranch_own_target(${name})
  # Files are named from tests/ or from src/.
  target_include_directories(${name} BEFORE PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE anabranch_test_support)

  if(ANABRANCH_SANITIZE STREQUAL "thread")
    list(REMOVE_ITEM arg_COMMUNICATORS process_group)
  endif()
  set(common LABELS ${arg_LABELS} TIMEOUT ${arg_TIMEOUT})
  foreach(ranks IN LISTS arg_RANKS)
    anabranch_add_ranks(${name}.np${ranks} ${name} ${ranks} ${common} ARGUMENTS --device cpu)
  endforeach()
  foreach(communicator IN LISTS arg_COMMUNICATORS)
    anabranch_add_ranks(${name}.${communicator}.np3 ${name} 3 ${common}
                        ARGUMENTS --device cpu --communicator ${communicator})
  endforeach()
  if(arg_CPU_ONLY OR NOT ANABRANCH_WITH_CUDA)
    return()
  endif()
  math(EXPR timeout "2 * ${arg_TIMEOUT}") # ranks that share a GPU wait for their turns
  set(common LABELS gpu ${arg_LABELS} TIMEOUT ${timeout} ENVIRONMENT ${cuda_environment}
      RESOURCE_LOCK gpu)
  foreach(ranks IN LISTS arg_CUDA_RANKS)
    anabranch_add_ranks(${name}.cuda.np${ranks} ${name} ${ranks} ${common} ARGUMENTS --device cuda)
  endforeach()
  if(arg_COMMUNICATORS)
    list(REMOVE_ITEM arg_COMMUNICATORS store) # the host's memory only
    foreach(communicator IN LISTS arg_COMMUNICATORS ITEMS mpi nccl)
      anabranch_add_ranks(${name}.cuda.${communicator}.np2 ${name} 2 ${common}
                          ARGUMENTS --device cuda --communicator ${communicator})
    endforeach()
  endif()
endfunction()

function(anabranch_script_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TIMEOUT;COST" "COMMAND;LABELS;ENVIRONMENT")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_COMMAND)
    message(FATAL_ERROR "anabranch_script_test(${name}): no COMMAND, or unknown: "
                        "${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 1800)
  endif()
  if(NOT arg_COST)
    set(arg_COST 0)
  endif()
  add_test(NAME ${name} COMMAND ${arg_COMMAND} WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}")
  set_tests_properties(
    ${name} PROPERTIES ENVIRONMENT "${test_environment};${arg_ENVIRONMENT}" TIMEOUT ${arg_TIMEOUT}
                       LABELS "script;${arg_LABELS}" COST ${arg_COST})
endfunction()

# `cmake --install`, and find_package(anabranch) for other projects.

include(CMakePackageConfigHelpers)

set(package_folder "${CMAKE_INSTALL_LIBDIR}/cmake/anabranch")
get_filename_component(ANABRANCH_LIBTORCH_ROOT "${LibTorch_INCLUDE_DIR}" DIRECTORY)

# The library finds LibTorch and MPI where they were found here. CMake would leave LibTorch out when
# it lies within the project's folder, as in .venv.
get_filename_component(libtorch_folder "${LibTorch_CPU_LIBRARY}" DIRECTORY)
set_target_properties(anabranch PROPERTIES INSTALL_RPATH "${libtorch_folder}"
                                           INSTALL_RPATH_USE_LINK_PATH ON)
install(TARGETS anabranch EXPORT anabranch_targets)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/anabranch"
        DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT anabranch_targets FILE anabranchTargets.cmake NAMESPACE anabranch::
        DESTINATION "${package_folder}")

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/anabranchConfig.cmake.in"
                              "${PROJECT_BINARY_DIR}/anabranchConfig.cmake"
                              INSTALL_DESTINATION "${package_folder}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/anabranchConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/anabranchConfig.cmake"
              "${PROJECT_BINARY_DIR}/anabranchConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindLibTorch.cmake"
        DESTINATION "${package_folder}")

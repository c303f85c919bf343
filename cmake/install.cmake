# find_package(flashprefill) for CMake users, or, inside a wheel (SKBUILD), the library beside the Python package.
if(SKBUILD)
  # A wheel holds no links, so versioned names would be copies of the library: here it has one name.
  set_property(TARGET flashprefill PROPERTY VERSION)
  set_property(TARGET flashprefill PROPERTY SOVERSION)
  install(TARGETS flashprefill LIBRARY DESTINATION flashprefill/lib)
  return()
endif()

include(CMakePackageConfigHelpers)
install(TARGETS flashprefill EXPORT flashprefillTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/flashprefill DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT flashprefillTargets NAMESPACE flashprefill:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/flashprefill)
configure_package_config_file(cmake/flashprefillConfig.cmake.in ${PROJECT_BINARY_DIR}/flashprefillConfig.cmake
                              INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/flashprefill)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flashprefillConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashprefillConfig.cmake ${PROJECT_BINARY_DIR}/flashprefillConfigVersion.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/flashprefill)

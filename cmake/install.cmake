# find_package(flashprefill) and pkg-config for C and C++, or, inside a wheel (SKBUILD), the library beside the Python package.
if(SKBUILD)
  # A wheel holds no links, so versioned names would be copies of the library: here it has one name.
  set_property(TARGET flashprefill PROPERTY VERSION)
  set_property(TARGET flashprefill PROPERTY SOVERSION)
  install(TARGETS flashprefill LIBRARY DESTINATION flashprefill/lib)
  return()
endif()

include(CMakePackageConfigHelpers)
set(cmake_folder ${CMAKE_INSTALL_LIBDIR}/cmake/flashprefill)
install(TARGETS flashprefill EXPORT flashprefillTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/flashprefill DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(EXPORT flashprefillTargets NAMESPACE flashprefill:: DESTINATION ${cmake_folder})
configure_package_config_file(cmake/flashprefillConfig.cmake.in ${PROJECT_BINARY_DIR}/flashprefillConfig.cmake
                              INSTALL_DESTINATION ${cmake_folder})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flashprefillConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashprefillConfig.cmake ${PROJECT_BINARY_DIR}/flashprefillConfigVersion.cmake
        DESTINATION ${cmake_folder})

# The prefix is found from where the .pc file lies, so that an installation may be moved.
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig OUTPUT_VARIABLE prefix_from_pc)
function(flashprefill_install_pc name libraries)
  set(FLASHPREFILL_PC_LIBRARIES "${libraries}")
  configure_file(cmake/flashprefill.pc.in ${PROJECT_BINARY_DIR}/${name}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()
flashprefill_install_pc(flashprefill "-L\${libdir} -lflashprefill")
if(FLASHPREFILL_STATIC)
  install(TARGETS flashprefill_static EXPORT flashprefillTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
  set(cuda_libraries "")
  if(FLASHPREFILL_CUDA)
    set(cuda_libraries "-L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -lrt ")
  endif()
  flashprefill_install_pc(flashprefill-static "\${libdir}/libflashprefill.a ${cuda_libraries}-lstdc++ -lm -lpthread -ldl")
endif()

# Backends are the folders of src/ that hold a backend.cmake, which calls
#
#     flashprefill_add_backend(NAME SOURCES a.cc b.cc ...)
#
# and defines `extern const Backend kNAMEBackend` in one of its sources. The table of them is written here.

function(flashprefill_add_backend name)
  cmake_parse_arguments(ARG "" "" "SOURCES" ${ARGN})
  list(TRANSFORM ARG_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
  target_sources(flashprefill_objects PRIVATE ${ARG_SOURCES})
  set_property(GLOBAL APPEND PROPERTY FLASHPREFILL_BACKENDS ${name})
endfunction()

macro(flashprefill_add_backends)
  file(GLOB backend_files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*/backend.cmake)
  foreach(backend_file IN LISTS backend_files)
    include(${backend_file})
  endforeach()
  get_property(backends GLOBAL PROPERTY FLASHPREFILL_BACKENDS)
  set(FLASHPREFILL_BACKEND_DECLARATIONS "")
  set(FLASHPREFILL_BACKEND_ENTRIES "")
  foreach(backend IN LISTS backends)
    string(APPEND FLASHPREFILL_BACKEND_DECLARATIONS "extern const Backend k${backend}Backend;\n")
    string(APPEND FLASHPREFILL_BACKEND_ENTRIES "    &k${backend}Backend,\n")
  endforeach()
  configure_file(${PROJECT_SOURCE_DIR}/cmake/backend_table.cc.in ${PROJECT_BINARY_DIR}/backend_table.cc @ONLY)
  target_sources(flashprefill_objects PRIVATE ${PROJECT_BINARY_DIR}/backend_table.cc)
endmacro()

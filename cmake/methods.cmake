# Methods are the folders of src/methods that hold a method.cc, which defines the method's row as `extern const Method
# kMethod` in the namespace flashprefill::methods::FOLDER. How a backend selects by the method is said in a file of the
# backend's name beside it. The tables of rows and of selectors are written here, so a new method is files added and no
# code changed.

# Sets LIST to the names of the method folders that hold FILE, and adds those files to the library.
function(flashprefill_method_folders file list)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/methods/*/${file})
  target_sources(flashprefill_objects PRIVATE ${sources})
  set(names "")
  foreach(source IN LISTS sources)
    cmake_path(GET source PARENT_PATH folder)
    cmake_path(GET folder FILENAME name)
    list(APPEND names ${name})
  endforeach()
  set(${list} ${names} PARENT_SCOPE)
endfunction()

# Writes Methods(), declared in core/method.h.
function(flashprefill_add_methods)
  flashprefill_method_folders(method.cc names)
  set(DECLARATIONS "")
  set(ENTRIES "")
  foreach(name IN LISTS names)
    string(APPEND DECLARATIONS "namespace methods::${name} {\nextern const Method kMethod;\n}\n")
    string(APPEND ENTRIES "      &methods::${name}::kMethod,\n")
  endforeach()
  configure_file(${PROJECT_SOURCE_DIR}/cmake/method_table.cc.in ${PROJECT_BINARY_DIR}/method_table.cc @ONLY)
  target_sources(flashprefill_objects PRIVATE ${PROJECT_BINARY_DIR}/method_table.cc)
endfunction()

# flashprefill_add_selectors(cpu Cpu), called by a backend's backend.cmake: collects src/methods/*/cpu.cc, each of which
# defines `extern const cpu::Selector kCpu` in its method's namespace, and writes cpu::SelectorOf(policy), declared in
# cpu/selector.h.
function(flashprefill_add_selectors BACKEND NAME)
  flashprefill_method_folders(${BACKEND}.cc names)
  set(DECLARATIONS "")
  set(ENTRIES "")
  foreach(name IN LISTS names)
    string(APPEND DECLARATIONS
           "namespace methods::${name} {\nextern const Method kMethod;\nextern const ${BACKEND}::Selector k${NAME};\n}\n")
    string(APPEND ENTRIES "      {&methods::${name}::kMethod, &methods::${name}::k${NAME}},\n")
  endforeach()
  set(output ${PROJECT_BINARY_DIR}/${BACKEND}_selectors.cc)
  configure_file(${PROJECT_SOURCE_DIR}/cmake/selector_table.cc.in ${output} @ONLY)
  target_sources(flashprefill_objects PRIVATE ${output})
endfunction()

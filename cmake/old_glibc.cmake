# A shared library for systems older than this one, for wheels. The compilers are the usual ones, so the code is what the
# tests ran. Only the link is done by Zig, which knows each symbol's versions back to FLASHPREFILL_GLIBC: dlopen of 2.2.5,
# not of 2.34. libstdc++ is linked in, for ours may be newer too. `-z defs` refuses a symbol that the old glibc has not.
# Zig's own run-time library stays out (-rtlib=none): it would bring its memcpy and exp, and a __cpu_model that nothing
# fills, so that no instruction set is found. What compilers call is in their libgcc.a.
find_program(FLASHPREFILL_ZIG zig REQUIRED DOC "Zig: the file `zig` in PyPI's package ziglang")
foreach(library libstdc++.a libgcc.a libgcc_s.so.1)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${library} OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  list(APPEND compiler_libraries ${path})
endforeach()
list(JOIN compiler_libraries " " compiler_libraries)
set(CMAKE_CXX_CREATE_SHARED_LIBRARY
    "\"${FLASHPREFILL_ZIG}\" cc -target ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu.${FLASHPREFILL_GLIBC} -rtlib=none -shared <SONAME_FLAG><TARGET_SONAME> \
-Wl,--gc-sections -Wl,-z,defs <LINK_FLAGS> -o <TARGET> <OBJECTS> <LINK_LIBRARIES> ${compiler_libraries}")
set_target_properties(flashprefill PROPERTIES LINKER_LANGUAGE CXX)
target_sources(flashprefill PRIVATE ${CMAKE_CURRENT_LIST_DIR}/old_glibc.c)
# The same bytes wherever they are built.
target_compile_options(flashprefill_objects PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:-ffile-prefix-map=${PROJECT_SOURCE_DIR}=.>
                       $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-ffile-prefix-map=${PROJECT_SOURCE_DIR}=.>)

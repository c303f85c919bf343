# Highway's headers are all we use of it: targets are chosen by our own table, so nothing of it is linked.
find_path(HIGHWAY_INCLUDE_DIR hwy/highway.h REQUIRED)
target_include_directories(flashprefill_objects SYSTEM PRIVATE ${HIGHWAY_INCLUDE_DIR})
flashprefill_add_backend(Cpu SOURCES backend.cc frame.cc key_threshold.cc top_p.cc simd/targets.cc
                         attend/attend.cc attend/kernels.cc attend/segment.cc attend/summary.cc attend/tile.cc
                         audit/audit.cc
                         energies/energies.cc energies/kernels.cc energies/panels.cc energies/similarity_kernels.cc
                         strided/kernels.cc strided/strided.cc
                         vertical_slash/kernels.cc vertical_slash/pooled_map.cc vertical_slash/vertical_slash.cc)
flashprefill_add_selectors(cpu Cpu)

# Files of intrinsics with flags of their own, called behind CPUID: see the head of attend/bf16.cc.
include(CheckCXXCompilerFlag)
set(bf16_flags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma)
function(flashprefill_add_intrinsics file name) # ... flags: name is defined if the compiler knows the last of them
  list(GET ARGN -1 flag)
  check_cxx_compiler_flag(${flag} FLASHPREFILL_CAN_${name})
  if(FLASHPREFILL_CAN_${name})
    target_sources(flashprefill_objects PRIVATE ${file})
    set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${ARGN}")
    target_compile_definitions(flashprefill_objects PRIVATE FLASHPREFILL_${name})
  endif()
endfunction()
flashprefill_add_intrinsics(${CMAKE_CURRENT_LIST_DIR}/attend/bf16.cc AVX512_BF16 ${bf16_flags})
if(CMAKE_SYSTEM_NAME STREQUAL "Linux") # which is asked for the registers
  flashprefill_add_intrinsics(${CMAKE_CURRENT_LIST_DIR}/attend/amx.cc AMX_BF16 ${bf16_flags} -mamx-tile -mamx-bf16)
endif()

# GCC 12's own intrinsics read a register that they have not set, on purpose, and warn about it.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_property(SOURCE ${CMAKE_CURRENT_LIST_DIR}/attend/kernels.cc ${CMAKE_CURRENT_LIST_DIR}/attend/bf16.cc
               ${CMAKE_CURRENT_LIST_DIR}/attend/amx.cc
               APPEND PROPERTY COMPILE_OPTIONS -Wno-maybe-uninitialized)
endif()

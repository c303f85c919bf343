# Highway's headers are all we use of it: targets are chosen by our own table, so nothing of it is linked.
find_path(HIGHWAY_INCLUDE_DIR hwy/highway.h REQUIRED)
target_include_directories(flashprefill_objects SYSTEM PRIVATE ${HIGHWAY_INCLUDE_DIR})
flashprefill_add_backend(Cpu SOURCES backend.cc targets.cc
                         attend.cc attend_tile.cc attend_kernels.cc
                         select.cc select_keep.cc select_kernels.cc
                         select_lines.cc lines.cc lines_kernels.cc flexprefill.cc minference.cc
                         grid_select.cc grid_kernels.cc xattention.cc rrattention.cc sample_attention.cc
                         alike_kernels.cc sparge_attn.cc prism.cc)

# One file of intrinsics with flags of its own, called behind CPUID: see the head of that file.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mavx512bf16 FLASHPREFILL_CAN_AVX512_BF16)
if(FLASHPREFILL_CAN_AVX512_BF16)
  set(bf16_file ${CMAKE_CURRENT_LIST_DIR}/attend_bf16.cc)
  target_sources(flashprefill_objects PRIVATE ${bf16_file})
  set_source_files_properties(${bf16_file} PROPERTIES COMPILE_OPTIONS
                              "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512bf16;-mfma")
  target_compile_definitions(flashprefill_objects PRIVATE FLASHPREFILL_AVX512_BF16)
endif()

# GCC 12's own intrinsics read a register that they have not set, on purpose, and warn about it.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_property(SOURCE ${CMAKE_CURRENT_LIST_DIR}/attend_kernels.cc ${CMAKE_CURRENT_LIST_DIR}/attend_bf16.cc
               APPEND PROPERTY COMPILE_OPTIONS -Wno-maybe-uninitialized)
endif()

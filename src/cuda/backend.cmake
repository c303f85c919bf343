# The CUDA backend. sm90/ is compiled for sm_90a alone: wgmma and the bulk copy engine are not in other architectures'
# instruction sets. sm80/ and common/ are compiled for each generation since Ampere, and as PTX for what comes. The
# runtime is linked statically, the driver is found at run time.
if(NOT FLASHPREFILL_CUDA)
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF) # the options below say it, in the one form that lets setmaxnreg and wgmma through
enable_language(CUDA)
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake 3.25 does not know that nvcc has it since 12.0
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit 12.4 REQUIRED)
# Architectures of the portable kernels: sm_80 is for all 8.x. The first one is there as PTX too.
set(portable 80 90)
if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND portable 120)
endif()
set(FLASHPREFILL_CUDA_PORTABLE "${portable}" CACHE STRING "Architectures that the portable CUDA kernels are built for")
set(portable_flags "")
foreach(architecture IN LISTS FLASHPREFILL_CUDA_PORTABLE)
  set(ptx "")
  if(portable_flags STREQUAL "")
    set(ptx ",compute_${architecture}")
  endif()
  list(APPEND portable_flags "-gencode=arch=compute_${architecture},code=[sm_${architecture}${ptx}]")
endforeach()

# Half of what zip makes of the kernels, and a fifth on disk; the driver unpacks a file's kernels when it loads them.
set(FLASHPREFILL_CUDA_COMPRESS "${SKBUILD}" CACHE BOOL "Compress the kernels as far as nvcc can (default in Python packages)")
set(compress_flags "")
if(FLASHPREFILL_CUDA_COMPRESS AND CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
  set(compress_flags --compress-mode=size)
elseif(FLASHPREFILL_CUDA_COMPRESS)
  set(compress_flags -Xfatbin=-compress-all)
endif()

file(GLOB FLASHPREFILL_CUDA_HOPPER CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/sm90/*/*.cu)
file(GLOB FLASHPREFILL_CUDA_ANY CONFIGURE_DEPENDS
     ${CMAKE_CURRENT_LIST_DIR}/common/*/*.cu ${CMAKE_CURRENT_LIST_DIR}/sm80/*/*.cu)
set_source_files_properties(${FLASHPREFILL_CUDA_HOPPER} PROPERTIES
  COMPILE_OPTIONS "-gencode=arch=compute_90a,code=sm_90a")
set_source_files_properties(${FLASHPREFILL_CUDA_ANY} PROPERTIES COMPILE_OPTIONS "${portable_flags}")

file(GLOB FLASHPREFILL_CUDA_SOURCES CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_LIST_DIR}
     ${CMAKE_CURRENT_LIST_DIR}/*.cc ${CMAKE_CURRENT_LIST_DIR}/*/*.cc ${CMAKE_CURRENT_LIST_DIR}/*/*/*.cc
     ${CMAKE_CURRENT_LIST_DIR}/*/*/*.cu)
flashprefill_add_backend(Cuda SOURCES ${FLASHPREFILL_CUDA_SOURCES})
flashprefill_add_selectors(cuda Cuda)
set_target_properties(flashprefill_objects PROPERTIES
  CUDA_ARCHITECTURES OFF CUDA_VISIBILITY_PRESET hidden)
target_compile_options(flashprefill_objects PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;${compress_flags}>)
target_include_directories(flashprefill_objects SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(flashprefill_objects PUBLIC CUDA::cudart_static)

# The CUDA backend for Hopper. Kernels are compiled for sm_90a alone: wgmma and the bulk copy engine are not in other
# architectures' instruction sets. The runtime is linked statically, the driver is found at run time.
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
file(GLOB FLASHPREFILL_CUDA_SOURCES CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_LIST_DIR}
     ${CMAKE_CURRENT_LIST_DIR}/*.cc ${CMAKE_CURRENT_LIST_DIR}/common/*.cc
     ${CMAKE_CURRENT_LIST_DIR}/sm90/*/*.cc ${CMAKE_CURRENT_LIST_DIR}/sm90/*/*.cu)
flashprefill_add_backend(Cuda SOURCES ${FLASHPREFILL_CUDA_SOURCES})
flashprefill_add_selectors(cuda Cuda)
set_target_properties(flashprefill_objects PROPERTIES
  CUDA_ARCHITECTURES OFF CUDA_VISIBILITY_PRESET hidden)
target_compile_options(flashprefill_objects PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr>)
target_include_directories(flashprefill_objects SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(flashprefill_objects PUBLIC CUDA::cudart_static)

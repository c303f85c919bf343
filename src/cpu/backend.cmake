# Highway's headers are all we use of it: targets are chosen by our own table, so nothing of it is linked.
find_path(HIGHWAY_INCLUDE_DIR hwy/highway.h REQUIRED)
target_include_directories(flashprefill_objects SYSTEM PRIVATE ${HIGHWAY_INCLUDE_DIR})
flashprefill_add_backend(Cpu SOURCES backend.cc targets.cc
                         attend.cc attend_tile.cc attend_kernels.cc
                         select.cc select_keep.cc select_kernels.cc)

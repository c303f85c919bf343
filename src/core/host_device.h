// Marks functions that host code and CUDA kernels share.
#ifndef FLASHPREFILL_CORE_HOST_DEVICE_H_
#define FLASHPREFILL_CORE_HOST_DEVICE_H_

#ifdef __CUDACC__
#define FLASHPREFILL_HOST_DEVICE __host__ __device__
#else
#define FLASHPREFILL_HOST_DEVICE
#endif

#endif // FLASHPREFILL_CORE_HOST_DEVICE_H_

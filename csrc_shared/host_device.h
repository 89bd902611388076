// Marks functions that serve on the host and, where a GPU compiler reads them, on the device too.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define BNB_HOST_DEVICE __host__ __device__
#else
#define BNB_HOST_DEVICE
#endif

#define BNB_ALWAYS_INLINE inline __attribute__((always_inline))

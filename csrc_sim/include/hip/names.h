// HIP's names for what csrc_sim has under CUDA's: one implementation, two names.
#pragma once

#include <utility>

#include "../../device/half.h"
#include "../../runtime.h"

// What HIP's compiler defines for AMD's GPUs.
#if !defined(__HIP_PLATFORM_AMD__)
#define __HIP_PLATFORM_AMD__ 1
#endif

#define BNB_SIMULATOR_TYPE(name) using hip##name = cuda##name;
#define BNB_SIMULATOR_VALUE(name) constexpr auto hip##name = cuda##name;
#define BNB_SIMULATOR_ATTRIBUTE(hip_name, cuda_name) \
  constexpr auto hipDeviceAttribute##hip_name = cudaDevAttr##cuda_name;
#define BNB_SIMULATOR_FUNCTION(name)                          \
  template <class... Arguments>                               \
  auto hip##name(Arguments&&... arguments) {                  \
    return cuda##name(std::forward<Arguments>(arguments)...); \
  }

BNB_SIMULATOR_TYPE(Error_t)
BNB_SIMULATOR_TYPE(Stream_t)
BNB_SIMULATOR_TYPE(Event_t)
BNB_SIMULATOR_TYPE(MemPool_t)
BNB_SIMULATOR_TYPE(MemPoolAttr)
BNB_SIMULATOR_TYPE(MemPoolProps)
BNB_SIMULATOR_TYPE(MemLocation)
BNB_SIMULATOR_TYPE(StreamCaptureStatus)
BNB_SIMULATOR_TYPE(StreamCaptureMode)

BNB_SIMULATOR_VALUE(Success)
BNB_SIMULATOR_VALUE(ErrorInvalidValue)
BNB_SIMULATOR_VALUE(ErrorInvalidConfiguration)
BNB_SIMULATOR_VALUE(ErrorInvalidDevice)
BNB_SIMULATOR_VALUE(ErrorNotReady)
BNB_SIMULATOR_VALUE(ErrorStreamCaptureUnsupported)
BNB_SIMULATOR_VALUE(MemcpyHostToHost)
BNB_SIMULATOR_VALUE(MemcpyHostToDevice)
BNB_SIMULATOR_VALUE(MemcpyDeviceToHost)
BNB_SIMULATOR_VALUE(MemcpyDeviceToDevice)
BNB_SIMULATOR_VALUE(MemcpyDefault)
BNB_SIMULATOR_VALUE(MemPoolAttrReleaseThreshold)
BNB_SIMULATOR_VALUE(MemAllocationTypePinned)
BNB_SIMULATOR_VALUE(MemHandleTypeNone)
BNB_SIMULATOR_VALUE(MemLocationTypeDevice)
BNB_SIMULATOR_VALUE(MemAttachGlobal)
BNB_SIMULATOR_VALUE(MemAdviseSetPreferredLocation)
BNB_SIMULATOR_VALUE(MemAdviseSetAccessedBy)
BNB_SIMULATOR_VALUE(CpuDeviceId)
BNB_SIMULATOR_VALUE(StreamDefault)
BNB_SIMULATOR_VALUE(StreamNonBlocking)
BNB_SIMULATOR_VALUE(StreamCaptureStatusNone)
BNB_SIMULATOR_VALUE(StreamCaptureStatusActive)
BNB_SIMULATOR_VALUE(StreamCaptureModeGlobal)
BNB_SIMULATOR_VALUE(StreamCaptureModeThreadLocal)
BNB_SIMULATOR_VALUE(StreamCaptureModeRelaxed)
BNB_SIMULATOR_VALUE(EventDefault)
BNB_SIMULATOR_VALUE(EventDisableTiming)
BNB_SIMULATOR_VALUE(FuncAttributeMaxDynamicSharedMemorySize)
BNB_SIMULATOR_VALUE(FuncAttributePreferredSharedMemoryCarveout)

constexpr auto hipErrorOutOfMemory = cudaErrorMemoryAllocation;

BNB_SIMULATOR_ATTRIBUTE(MaxThreadsPerBlock, MaxThreadsPerBlock)
BNB_SIMULATOR_ATTRIBUTE(WarpSize, WarpSize)
BNB_SIMULATOR_ATTRIBUTE(MaxRegistersPerBlock, MaxRegistersPerBlock)
BNB_SIMULATOR_ATTRIBUTE(MultiprocessorCount, MultiProcessorCount)
BNB_SIMULATOR_ATTRIBUTE(L2CacheSize, L2CacheSize)
BNB_SIMULATOR_ATTRIBUTE(MaxThreadsPerMultiProcessor, MaxThreadsPerMultiProcessor)
BNB_SIMULATOR_ATTRIBUTE(ComputeCapabilityMajor, ComputeCapabilityMajor)
BNB_SIMULATOR_ATTRIBUTE(ComputeCapabilityMinor, ComputeCapabilityMinor)
BNB_SIMULATOR_ATTRIBUTE(ManagedMemory, ManagedMemory)
BNB_SIMULATOR_ATTRIBUTE(ConcurrentManagedAccess, ConcurrentManagedAccess)
BNB_SIMULATOR_ATTRIBUTE(MemoryPoolsSupported, MemoryPoolsSupported)

constexpr auto hipDeviceAttributeMaxSharedMemoryPerBlock = simulatedAttributeSharedBytesOfAmd;
constexpr auto hipDeviceAttributeSharedMemPerBlockOptin = simulatedAttributeSharedBytesOfAmd;
constexpr auto hipDeviceAttributeMaxSharedMemoryPerMultiprocessor = simulatedAttributeSharedBytesOfAmd;

BNB_SIMULATOR_FUNCTION(GetErrorName)
BNB_SIMULATOR_FUNCTION(GetErrorString)
BNB_SIMULATOR_FUNCTION(GetLastError)
BNB_SIMULATOR_FUNCTION(PeekAtLastError)
BNB_SIMULATOR_FUNCTION(GetDeviceCount)
BNB_SIMULATOR_FUNCTION(GetDevice)
BNB_SIMULATOR_FUNCTION(SetDevice)
BNB_SIMULATOR_FUNCTION(DeviceGetAttribute)
BNB_SIMULATOR_FUNCTION(DeviceSynchronize)
BNB_SIMULATOR_FUNCTION(DriverGetVersion)
BNB_SIMULATOR_FUNCTION(RuntimeGetVersion)
BNB_SIMULATOR_FUNCTION(Malloc)
BNB_SIMULATOR_FUNCTION(Free)
BNB_SIMULATOR_FUNCTION(MallocAsync)
BNB_SIMULATOR_FUNCTION(FreeAsync)
BNB_SIMULATOR_FUNCTION(MallocFromPoolAsync)
BNB_SIMULATOR_FUNCTION(MallocManaged)
BNB_SIMULATOR_FUNCTION(MemGetInfo)
BNB_SIMULATOR_FUNCTION(MemPrefetchAsync)
BNB_SIMULATOR_FUNCTION(MemAdvise)
BNB_SIMULATOR_FUNCTION(Memcpy)
BNB_SIMULATOR_FUNCTION(MemcpyAsync)
BNB_SIMULATOR_FUNCTION(Memset)
BNB_SIMULATOR_FUNCTION(MemsetAsync)
BNB_SIMULATOR_FUNCTION(MemPoolCreate)
BNB_SIMULATOR_FUNCTION(MemPoolDestroy)
BNB_SIMULATOR_FUNCTION(MemPoolSetAttribute)
BNB_SIMULATOR_FUNCTION(MemPoolGetAttribute)
BNB_SIMULATOR_FUNCTION(MemPoolTrimTo)
BNB_SIMULATOR_FUNCTION(DeviceGetDefaultMemPool)
BNB_SIMULATOR_FUNCTION(StreamCreate)
BNB_SIMULATOR_FUNCTION(StreamCreateWithFlags)
BNB_SIMULATOR_FUNCTION(StreamDestroy)
BNB_SIMULATOR_FUNCTION(StreamSynchronize)
BNB_SIMULATOR_FUNCTION(StreamQuery)
BNB_SIMULATOR_FUNCTION(StreamIsCapturing)
BNB_SIMULATOR_FUNCTION(ThreadExchangeStreamCaptureMode)
BNB_SIMULATOR_FUNCTION(StreamWaitEvent)
BNB_SIMULATOR_FUNCTION(EventCreate)
BNB_SIMULATOR_FUNCTION(EventCreateWithFlags)
BNB_SIMULATOR_FUNCTION(EventDestroy)
BNB_SIMULATOR_FUNCTION(EventRecord)
BNB_SIMULATOR_FUNCTION(EventSynchronize)
BNB_SIMULATOR_FUNCTION(EventQuery)
BNB_SIMULATOR_FUNCTION(EventElapsedTime)
BNB_SIMULATOR_FUNCTION(FuncSetAttribute)
BNB_SIMULATOR_FUNCTION(OccupancyMaxActiveBlocksPerMultiprocessor)

#undef BNB_SIMULATOR_TYPE
#undef BNB_SIMULATOR_VALUE
#undef BNB_SIMULATOR_ATTRIBUTE
#undef BNB_SIMULATOR_FUNCTION

using __hip_bfloat16 = __nv_bfloat16;
using __hip_bfloat162 = __nv_bfloat162;
using __hip_bfloat16_raw = __nv_bfloat16_raw;

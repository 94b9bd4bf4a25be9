// Marks for code that is the law of the matrix: the same source runs on every host and device, so
// it uses only integer operations and IEEE-exact fp32 add, multiply and fma, never contracted.
#pragma once

#if defined(__CUDACC__)
#define TRAK_EXT_LAW __host__ __device__ __forceinline__
#else
// always_inline: units compiled for different instruction sets must never share one out-of-line
// copy, or the linker may keep the one that an older machine cannot run.
#define TRAK_EXT_LAW static inline __attribute__((always_inline))
#endif

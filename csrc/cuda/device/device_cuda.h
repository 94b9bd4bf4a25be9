// The device's operations, as CUDA has them (see device.h).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "shared_limit.h"

#define TRAK_EXT_DEVICE __device__ __forceinline__
#define TRAK_EXT_KERNEL(threads, blocks_per_sm) \
  __global__ void __launch_bounds__(threads, blocks_per_sm)
#define TRAK_EXT_KERNEL_ARGUMENT const __grid_constant__
#define TRAK_EXT_DEVICE_TABLE __device__ const

namespace trak_ext::cuda::device {

using Stream = cudaStream_t;

TRAK_EXT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TRAK_EXT_DEVICE int64_t block_index() { return blockIdx.x; }
TRAK_EXT_DEVICE void block_barrier() { __syncthreads(); }

TRAK_EXT_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char trak_ext_shared[];
  return trak_ext_shared;
}

template <class T>
TRAK_EXT_DEVICE T load_shared(const void* address) {
  return *static_cast<const T*>(address);
}
template <class T>
TRAK_EXT_DEVICE void store_shared(void* address, T value) {
  *static_cast<T*>(address) = value;
}
// That an address is global is said by a cast from that space, of a number that the compiler cannot
// look into: __isGlobal, which leaves it free to fold offsets, tells it nothing where a pointer was
// made of an integer, and then a load is the generic, slower instruction.
template <class T>
TRAK_EXT_DEVICE T load_global(const void* address) {
  size_t number = __cvta_generic_to_global(address);
  asm("" : "+l"(number));
  return *static_cast<const T*>(__cvta_global_to_generic(number));
}
template <class T>
TRAK_EXT_DEVICE void store_global(void* address, T value) {
  __builtin_assume(__isGlobal(address));
  *static_cast<T*>(address) = value;
}

// Copies from global to shared memory that go on while the thread does other things.
template <int kBytes>
TRAK_EXT_DEVICE void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // past L1: the tile is read from shared memory
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
#endif
}
TRAK_EXT_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
TRAK_EXT_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

TRAK_EXT_DEVICE void warp_barrier() { __syncwarp(); }

// Core matrices in shared memory, 8 rows of 16 bytes each, in two pairs that are `pair_bytes`
// apart, the second of a pair `half_bytes` after the first: register i gets bytes 4 t to 4 t + 3 of
// row g of matrix i. A pair is what multiply_bf16 wants for b0 and b1.
TRAK_EXT_DEVICE void load_four_matrices(const char* shared, int half_bytes, int pair_bytes,
                                        uint32_t* registers) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + lane % 8 * 16 +
                    lane / 8 % 2 * half_bytes + lane / 16 * pair_bytes;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(from)
               : "memory");
}
// One pair of them.
TRAK_EXT_DEVICE void load_two_matrices(const char* shared, int half_bytes, uint32_t* registers) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + lane % 8 * 16 +
                    lane / 8 % 2 * half_bytes;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(from)
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8] over a warp. With g = lane / 4 and t = lane % 4, a register of `a`
// or `b` holding two bf16, the lower index in the lower half:
//   a: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 in the first two, 2t + 8, 2t + 9 in the others
//   b: rows 2t, 2t + 1 and 2t + 8, 2t + 9; column g
//   d: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
TRAK_EXT_DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // the launcher never takes this kernel there
#endif
}

// Two floats as bf16 in one register: to nearest even, and towards zero. NaN stays NaN.
TRAK_EXT_DEVICE uint32_t pack_nearest(float lower, float upper) {
  uint32_t packed = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
#endif
  return packed;
}
TRAK_EXT_DEVICE uint32_t pack_truncated(float lower, float upper) {
  uint32_t packed = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rz.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
#endif
  return packed;
}

// The value, of magnitude `limit` at most; of NaN, the limit with either sign.
TRAK_EXT_DEVICE float limit_magnitude(float value, float limit) {
#if __CUDA_ARCH__ >= 860
  float result;
  asm("min.xorsign.abs.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(limit));
  return result;
#else
  return fmaxf(fminf(value, limit), -limit);
#endif
}

TRAK_EXT_DEVICE float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// (~word & mask) | one in one instruction. Written out, because the compiler makes two of it where
// both constants are known to it and only one can be an immediate.
TRAK_EXT_DEVICE uint32_t clear_then_set(uint32_t word, uint32_t mask, uint32_t one) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(result) : "r"(word), "r"(mask), "r"(one));
  return result;
}

// Bit i: whether lane i of the warp says yes; called by all lanes.
TRAK_EXT_DEVICE uint32_t ballot(bool yes) { return __ballot_sync(0xFFFFFFFFu, yes); }
TRAK_EXT_DEVICE int count_bits(uint32_t word) { return __popc(word); }

TRAK_EXT_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

template <class T>
TRAK_EXT_DEVICE T infinity() {
  return static_cast<T>(__int_as_float(0x7F800000));
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // leave no error behind for the next caller
  throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
}

// The limits of this process's kernels, see shared_limit.h.
inline SharedLimits shared_limits;

// On the current device.
inline void allow_shared_memory(const void* kernel, int shared_bytes) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  shared_limits.allow(
      kernel, device, shared_bytes,
      [kernel] {
        // This loads the kernel too, before the launch, where a call has made that safe.
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
        return attributes.maxDynamicSharedSizeBytes;
      },
      [kernel](int bytes) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "cudaFuncSetAttribute (shared memory of a kernel)");
      });
}

template <class Argument>
void launch(void (*kernel)(Argument), int64_t blocks, int threads, int shared_bytes, Stream stream,
            Argument argument) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(address, shared_bytes);
  void* arguments[] = {&argument};
  check(cudaLaunchKernel(address, dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments,
                         static_cast<size_t>(shared_bytes), stream),
        "the launch of a kernel");
}

}  // namespace trak_ext::cuda::device

#include "warpgroup_cuda.h"

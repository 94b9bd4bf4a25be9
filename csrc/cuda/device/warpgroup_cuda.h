// The matrix instruction of sm_90a, as CUDA has it (see device_cuda.h, which includes this).
//
// After the PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" (wgmma.mma_async): four
// warps multiply a [64, 16] operand in their registers with a [16, rows] one that the tensor core
// reads from shared memory by itself, while they go on. Until wait_multiplied says so, the
// registers of both and the shared memory are the instruction's.
#pragma once

#include <cstdint>

namespace trak_ext::cuda::device {

// The code of other architectures is a trap; the launcher never takes it there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TRAK_EXT_WARPGROUPS 1
#endif
#if defined(TRAK_EXT_WARPGROUPS) || !defined(__CUDA_ARCH__)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

TRAK_EXT_DEVICE void never_called() {
#if defined(__CUDA_ARCH__)
  __trap();
#endif
}

// Four consecutive warps, as a number that the compiler knows to be the same for all lanes.
TRAK_EXT_DEVICE int warpgroup_index() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 128, 0);
}

// A matrix descriptor without swizzling, for an operand whose summed index runs along memory ("K
// major"). It consists of core matrices: 8 rows of 16 bytes, 128 consecutive bytes. From one to the
// next along the summed index it is `summed_bytes` (the leading dimension byte offset), to the next
// 8 rows `row_bytes` (the stride dimension byte offset). All are multiples of 16; in the descriptor
// bits 0 to 13 are the address, 16 to 29 the one and 32 to 45 the other, each without its low four
// bits.
TRAK_EXT_DEVICE uint64_t describe_operand(const void* shared, int summed_bytes, int row_bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t low = (address & 0x3FFFFu) >> 4 | static_cast<uint32_t>(summed_bytes >> 4) << 16;
  return low | static_cast<uint64_t>(row_bytes >> 4) << 32;
}
// The descriptor of the same operand `bytes` further on.
TRAK_EXT_DEVICE uint64_t move_operand(uint64_t operand, int bytes) {
  return operand + static_cast<uint64_t>(bytes >> 4);
}

// Before multiplications whose registers `a` or `d` were touched since the last one.
template <int kCount, int kRowTiles>
TRAK_EXT_DEVICE void begin_multiply(uint32_t (&a)[kCount][4], float (& /*d*/)[kRowTiles][4]) {
#if defined(TRAK_EXT_WARPGROUPS)
#pragma unroll
  for (int i = 0; i + 1 < kCount; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
  asm volatile("wgmma.fence.sync.aligned;"
               : "+r"(a[kCount - 1][0]), "+r"(a[kCount - 1][1]), "+r"(a[kCount - 1][2]),
                 "+r"(a[kCount - 1][3])::"memory");
#endif
}

#define TRAK_EXT_D4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])

// Starts d[64, rows] += a[64, 16] b[16, rows], or d = a b where `add` is false. Warp w of the four
// has rows 16 w to 16 w + 15 of `a` and `d`, in registers as multiply_bf16 has them; d[n] is of the
// operand's rows 8 n to 8 n + 7.
template <int kRows>
TRAK_EXT_DEVICE void multiply_async(float (&d)[kRows / 8][4], const uint32_t (&a)[4], uint64_t b,
                                    bool add_to) {
#if defined(TRAK_EXT_WARPGROUPS)
  const int add = add_to;
  // clang-format off
  if constexpr (kRows == 8) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %9, 0; "
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, %8, p, 1, 1, 0; }"
        : TRAK_EXT_D4(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)
        : "memory");
  } else if constexpr (kRows == 16) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %13, 0; "
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, p, 1, 1, 0; }"
        : TRAK_EXT_D4(d, 0), TRAK_EXT_D4(d, 1)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)
        : "memory");
  } else if constexpr (kRows == 32) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %21, 0; "
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, p, 1, 1, 0; }"
        : TRAK_EXT_D4(d, 0), TRAK_EXT_D4(d, 1), TRAK_EXT_D4(d, 2), TRAK_EXT_D4(d, 3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)
        : "memory");
  } else if constexpr (kRows == 64) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %37, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
        : TRAK_EXT_D4(d, 0), TRAK_EXT_D4(d, 1), TRAK_EXT_D4(d, 2), TRAK_EXT_D4(d, 3),
          TRAK_EXT_D4(d, 4), TRAK_EXT_D4(d, 5), TRAK_EXT_D4(d, 6), TRAK_EXT_D4(d, 7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)
        : "memory");
  } else if constexpr (kRows == 128) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %69, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
        : TRAK_EXT_D4(d, 0), TRAK_EXT_D4(d, 1), TRAK_EXT_D4(d, 2), TRAK_EXT_D4(d, 3),
          TRAK_EXT_D4(d, 4), TRAK_EXT_D4(d, 5), TRAK_EXT_D4(d, 6), TRAK_EXT_D4(d, 7),
          TRAK_EXT_D4(d, 8), TRAK_EXT_D4(d, 9), TRAK_EXT_D4(d, 10), TRAK_EXT_D4(d, 11),
          TRAK_EXT_D4(d, 12), TRAK_EXT_D4(d, 13), TRAK_EXT_D4(d, 14), TRAK_EXT_D4(d, 15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)
        : "memory");
  } else {
    static_assert(kRows == 128, "written out for 8, 16, 32, 64 and 128 rows");
  }
  // clang-format on
#endif
}

#undef TRAK_EXT_D4

// Barriers in shared memory, 8 bytes each (PTX ISA, "mbarrier"): a phase ends when so many arrivals
// have come, and with them all bytes that were expected. Phases count from 0.
TRAK_EXT_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
TRAK_EXT_DEVICE void begin_arrivals(char* barrier, int arrivals) {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}
// Makes barriers that this thread began visible to copies.
TRAK_EXT_DEVICE void publish_arrivals() {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
TRAK_EXT_DEVICE void arrive(char* barrier) {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
// Arrives, and has the phase wait for so many bytes of copies too.
TRAK_EXT_DEVICE void expect_bytes(char* barrier, int bytes) {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
// Starts a copy of consecutive bytes, a multiple of 16 at multiples of 16.
TRAK_EXT_DEVICE void copy_bulk(char* shared, const char* global, int bytes, char* barrier) {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}
// Waits for the end of a phase, by whether its number is odd. At most one later phase has begun.
TRAK_EXT_DEVICE void wait_arrivals(char* barrier, int odd) {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile(
      "{ .reg .pred done; "
      "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
      "@!done bra AGAIN; }" ::"r"(shared_address(barrier)),
      "r"(odd)
      : "memory");
#endif
}

// Makes a group of what was started since the last group; wait_multiplied waits until at most
// kPending groups are under way.
TRAK_EXT_DEVICE void commit_multiplied() {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending>
TRAK_EXT_DEVICE void wait_multiplied() {
#if defined(TRAK_EXT_WARPGROUPS)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// The same for all groups, after which `d` may be read.
template <int kRowTiles>
TRAK_EXT_DEVICE void finish_multiply(float (&d)[kRowTiles][4]) {
  wait_multiplied<0>();
#if defined(TRAK_EXT_WARPGROUPS)
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
#endif
}

}  // namespace trak_ext::cuda::device

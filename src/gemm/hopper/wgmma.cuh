#pragma once

// The warpgroup's matrix product, d[64, n] (+)= a[64, 16] · b[16, n], both from shared memory, in the
// shapes and types the grouped GEMM uses. Thread t of the warpgroup holds of rows r = 16 (t / 32) +
// t % 32 / 4 and r + 8, for each j: d[4 j], d[4 j + 1] at (r, 8 j + 2 (t % 4)) and the column after
// it, d[4 j + 2], d[4 j + 3] at (r + 8, the same columns).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace anabranch::hopper {

/// Accumulators are not to be touched between begin and wait.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Until at most `kPending` of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// A matrix in shared memory as boxes of 64 (rows) x 128 bytes with the 128-byte swizzle, one after
/// another along the matrix's non-reduced dimension. `kTransposed`: the reduced dimension runs along
/// the boxes' rows.
template <bool kTransposed>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kBox = uint64_t{8192 >> 4} << 16;
  return kSwizzle128 | kEightRows | (kTransposed ? kBox : uint64_t{1} << 16) |
         ((address & 0x3FFFF) >> 4);
}
/// What to add to a descriptor to go 16 elements along the reduced dimension.
template <bool kTransposed>
constexpr uint64_t kDescriptorStep = (kTransposed ? 16 * 128 : 16 * 2) >> 4;

// The accumulators as the operands of one instruction: their names, and their bindings.
// clang-format off
#define ANABRANCH_NAMES_0_63 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31," \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ANABRANCH_NAMES_64_127 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79," \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95," \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111," \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ANABRANCH_BIND_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ANABRANCH_BIND_64(i) \
  ANABRANCH_BIND_8(i), ANABRANCH_BIND_8(i + 8), ANABRANCH_BIND_8(i + 16), \
  ANABRANCH_BIND_8(i + 24), ANABRANCH_BIND_8(i + 32), ANABRANCH_BIND_8(i + 40), \
  ANABRANCH_BIND_8(i + 48), ANABRANCH_BIND_8(i + 56)
// The operands after the accumulators, by number: descriptors A and B, accumulate, transposed A, B.
#define ANABRANCH_WGMMA(COLUMNS, TYPE, NAMES, A, B, ACCUMULATE, TRANSPOSED_A, TRANSPOSED_B, ...) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES "}, " \
      A ", " B ", p, 1, 1, " TRANSPOSED_A ", " TRANSPOSED_B ";\n}" \
      : __VA_ARGS__ \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposedA), "n"(kTransposedB))
#define ANABRANCH_WGMMA_128(TYPE) \
  ANABRANCH_WGMMA("128", TYPE, ANABRANCH_NAMES_0_63, "%64", "%65", "%66", "%67", "%68", \
                  ANABRANCH_BIND_64(0))
#define ANABRANCH_WGMMA_256(TYPE) \
  ANABRANCH_WGMMA("256", TYPE, ANABRANCH_NAMES_0_63 ", " ANABRANCH_NAMES_64_127, \
                  "%128", "%129", "%130", "%131", "%132", \
                  ANABRANCH_BIND_64(0), ANABRANCH_BIND_64(64))
// clang-format on

/// multiply(d, a, b, accumulate): d (+)= a · b over 16 elements of the reduced dimension.
template <int kColumns>
struct WarpgroupProduct;

template <>
struct WarpgroupProduct<128> {
  template <typename scalar_t, bool kTransposedA, bool kTransposedB>
  __device__ static __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b,
                                                  int accumulate) {
    if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
      ANABRANCH_WGMMA_128("bf16");
    } else {
      ANABRANCH_WGMMA_128("f16");
    }
  }
};

template <>
struct WarpgroupProduct<256> {
  template <typename scalar_t, bool kTransposedA, bool kTransposedB>
  __device__ static __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b,
                                                  int accumulate) {
    if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
      ANABRANCH_WGMMA_256("bf16");
    } else {
      ANABRANCH_WGMMA_256("f16");
    }
  }
};

#undef ANABRANCH_WGMMA_256
#undef ANABRANCH_WGMMA_128
#undef ANABRANCH_WGMMA
#undef ANABRANCH_BIND_64
#undef ANABRANCH_BIND_8
#undef ANABRANCH_NAMES_64_127
#undef ANABRANCH_NAMES_0_63

}  // namespace anabranch::hopper

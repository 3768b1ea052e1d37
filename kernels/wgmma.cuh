// Hopper's matrix products of warpgroups (wgmma): a group of 128 threads multiplies matrices in shared memory, described by 64-bit words,
// while it does other things. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation". sm_90a alone has them.
//
// Results d are as mma's: thread t of the group has of rows t / 32 * 16 + t % 32 / 4 and that + 8 the columns c * 8 + t % 4 * 2 and that + 1 of
// every c, as d[c][0..1] and d[c][2..3]. They must not be touched between a product and the wait for its group.
#pragma once
#include "panels.cuh"

// A descriptor of Panels P: bits 0 to 13 begin, 16 to 29 the leading dimension's offset, 32 to 45 the stride dimension's, all in units of 16
// bytes; 62 and 63 the swizzle: 1 of 128 bytes, 2 of 64.
template <class P>
__device__ __forceinline__ uint64_t describe(uint32_t begin, int leading) {
    const uint64_t stride = 8 * P::ROW, swizzle = P::ROW == 128 ? 1 : 2;
    return (begin & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62;
}
// 32 bytes of columns of rows from `row` on, a multiple of 8, by which rows are multiplied with rows (K-major; the leading offset counts for nothing).
template <class P>
__device__ __forceinline__ uint64_t describe_columns(uint32_t panels, int row, int first) { return describe<P>(panels + P::begin(row, first), 16); }
// 16 rows, all their columns, which weights are multiplied with (MN-major: panels follow in the leading dimension).
template <class P>
__device__ __forceinline__ uint64_t describe_rows(uint32_t panels, int row) { return describe<P>(panels + P::begin(row, 0), P::PANEL); }

#ifdef RUDDER_EMULATE
#include "emulate/wgmma.h"
#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RUDDER_WGMMA

// Registers that were written before are seen by products that begin after.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the newest `PENDING` groups are done.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from reading results before the wait above.
template <int COLUMNS>
__device__ __forceinline__ void products_done(float (&d)[COLUMNS][4]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[c][i])::"memory");
}

#define ACCUMULATORS_1(d, c) "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
#define ACCUMULATORS_4(d, c) ACCUMULATORS_1(d, c), ACCUMULATORS_1(d, c + 1), ACCUMULATORS_1(d, c + 2), ACCUMULATORS_1(d, c + 3)
#define ACCUMULATORS_8(d, c) ACCUMULATORS_4(d, c), ACCUMULATORS_4(d, c + 4)
#define ACCUMULATORS_12(d, c) ACCUMULATORS_8(d, c), ACCUMULATORS_4(d, c + 8)
#define ACCUMULATORS_16(d, c) ACCUMULATORS_8(d, c), ACCUMULATORS_8(d, c + 8)
#define ACCUMULATORS_32(d, c) ACCUMULATORS_16(d, c), ACCUMULATORS_16(d, c + 16)
#define REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_48 REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_64 REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128 REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d = a * b, or added to it where `added`: of 64 rows of a, 16 wide, and COLUMNS * 8 of b, both K-major in shared memory.
template <int COLUMNS>
__device__ __forceinline__ void multiply_rows(float (&d)[COLUMNS][4], uint64_t a, uint64_t b, bool added) {
    static_assert(COLUMNS == 8 || COLUMNS == 16, "written for these");
    const int accumulate = added;
    if constexpr (COLUMNS == 8)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                     : ACCUMULATORS_8(d, 0)
                     : "l"(a), "l"(b), "r"(accumulate));
    else if constexpr (COLUMNS == 16)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                     : ACCUMULATORS_16(d, 0)
                     : "l"(a), "l"(b), "r"(accumulate));
}

// The same of FP8, 32 wide.
__device__ __forceinline__ void multiply_rows_fp8(float (&d)[16][4], uint64_t a, uint64_t b, bool added) {
    const int accumulate = added;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" REGISTERS_64 "}, %64, %65, p, 1, 1;\n}"
                 : ACCUMULATORS_16(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate));
}

// d += a * b: of 64 rows of a, 16 wide, in the registers of the group as mma has them, and 16 rows of b, COLUMNS * 8 wide, MN-major.
template <int COLUMNS>
__device__ __forceinline__ void add_weighted(float (&d)[COLUMNS][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(COLUMNS == 8 || COLUMNS == 12 || COLUMNS == 16 || COLUMNS == 32, "written for these");
    if constexpr (COLUMNS == 8)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : ACCUMULATORS_8(d, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else if constexpr (COLUMNS == 12)
        asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" REGISTERS_48 "}, {%48, %49, %50, %51}, %52, 1, 1, 1, 1;"
                     : ACCUMULATORS_12(d, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else if constexpr (COLUMNS == 16)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                     : ACCUMULATORS_16(d, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else if constexpr (COLUMNS == 32)
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" REGISTERS_128 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                     : ACCUMULATORS_32(d, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif
#endif

// Blackwell's tensor cores (tcgen05): one thread has matrices in shared memory multiplied, described by 64-bit words; sums lie in a memory of
// their own, tensor memory. PTX ISA, "TensorCore 5th Generation Family Instructions". sm_100a and sm_103a have them.
//
// Tensor memory has 128 lanes and 512 columns of 32 bits; an address is a lane, from bit 16 on, and a column. A product of 128 rows of a and N of b
// is d: row i is lane i, column j column j, f32. All that is done there is asynchronous: products of one thread into the same columns run in their
// order; a commit lets a barrier know when those before it are done; loads are waited for. Between threads a fence is due on both sides of
// what synchronises them.
#pragma once
#include "panels.cuh"

// Element formats of products of 8 bits and less, as instruction descriptors number them.
#define FORMAT_E4M3 0u
#define FORMAT_E2M1 5u
#define FORMAT_BF16 1u  // of products of 16 bits

// What Blackwell's descriptors of shared memory have in common: bits 0 to 13 begin, 16 to 29 the leading dimension's offset, 32 to 45 the
// stride dimension's, all in units of 16 bytes; 46 to 48 are 1; 61 to 63 the swizzle: 0 none, 2 of 128 bytes, 4 of 64.
__device__ __forceinline__ uint64_t tensor_describe(uint32_t begin, uint64_t leading, uint64_t stride, uint64_t swizzle) {
    return (begin & 0x3ffff) >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | 1ull << 46 | swizzle << 61;
}
// 32 bytes of columns of rows of Panels P from `row` on, a multiple of 8 (K-major; the leading offset counts for nothing).
template <class P>
__device__ __forceinline__ uint64_t tensor_columns(uint32_t panels, int row, int first) {
    return tensor_describe(panels + P::begin(row, first), 16, 8 * P::ROW, P::ROW == 128 ? 2 : 4);
}
// 16 rows, all their columns, which weights are multiplied with (MN-major: panels follow in the leading dimension).
template <class P>
__device__ __forceinline__ uint64_t tensor_rows(uint32_t panels, int row) {
    return tensor_describe(panels + P::begin(row, 0), P::PANEL, 8 * P::ROW, P::ROW == 128 ? 2 : 4);
}

// An instruction descriptor: sums of f32 (bits 4 and 5), a's format from bit 7 on, b's from 10, b's rows / 8 from 17, 128 rows of a / 16 from 24. With
// TENSOR_COLUMNS_OF_B added b is MN-major.
__device__ __forceinline__ uint32_t tensor_instruction(uint32_t a, uint32_t b, int rows_of_b) {
    return 1u << 4 | a << 7 | b << 10 | static_cast<uint32_t>(rows_of_b / 8) << 17 | 128u / 16 << 24;
}

#define TENSOR_COLUMNS_OF_B (1u << 16)
// The same of products whose blocks of 32 elements have scales, powers of two (UE8M0, bit 23): those that a row has for four blocks lie in one word
// of tensor memory, and `block` of them is taken (bits 29 and 4).
__device__ __forceinline__ uint32_t tensor_instruction_scaled(uint32_t a, uint32_t b, int rows_of_b, uint32_t block) {
    return block << 4 | a << 7 | b << 10 | static_cast<uint32_t>(rows_of_b / 8) << 17 | 1u << 23 | 128u / 128 << 27 | block << 29;
}
// The same of E2M1 alone (1 among the formats of that kind), whose blocks of 16 elements have scales of E4M3 (0 in bit 23): a row's word is of all 64
// elements of a product.
__device__ __forceinline__ uint32_t tensor_instruction_fp4(int rows_of_b) {
    return 1u << 7 | 1u << 10 | static_cast<uint32_t>(rows_of_b / 8) << 17 | 128u / 128 << 27;
}
// Where the word of a row's scales begins in shared memory, of 128 rows: 32 rows' words of 4 bytes lie 16 bytes apart, the next 32 rows' beside them.
__device__ __forceinline__ int scales_place(int row) { return row % 32 * 16 + row / 32 * 4; }
#define SCALES_BYTES 512
#define SCALES_COLUMNS 4

#ifdef RUDDER_EMULATE
#include "emulate/tcgen05.h"
#else

#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
#define RUDDER_TCGEN05

// Whether this lane is the one of its warp that was elected; all of them ask.
__device__ __forceinline__ bool elected() {
    uint32_t is;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is));
    return is;
}

// A barrier in shared memory that one commit completes, again and again; others may use it after the block's next barrier.
__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier)) : "memory");
}
// Waits until it was completed the first, third, fifth .. (parity 0) or second, fourth .. time (1); nobody may be a time behind.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!done);
}

// A warp takes COLUMNS columns, a power of two from 32 on, and has their address put into shared memory; waits while other blocks have them.
template <int COLUMNS>
__device__ __forceinline__ void tensor_allocate(uint32_t* address) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;\ntcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::"r"(shared_address(address)), "n"(COLUMNS) : "memory");
}
// A warp gives them back, which it must, when nobody uses them any more.
template <int COLUMNS>
__device__ __forceinline__ void tensor_free(uint32_t address) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(COLUMNS) : "memory");
}

// Before and after threads synchronise that use tensor memory one after another.
__device__ __forceinline__ void tensor_before_sync() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ __forceinline__ void tensor_after_sync() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// d = a * b, or added to it where `added`: 32 bytes of columns of 128 rows of a and of rows of b, of bf16.
__device__ __forceinline__ void tensor_multiply(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool added) {
    const uint32_t accumulate = added;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\ntcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;\n}" ::"r"(d), "l"(a), "l"(b), "r"(instruction), "r"(accumulate) : "memory");
}
// The same of FP8 (E4M3).
__device__ __forceinline__ void tensor_multiply_fp8(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool added) {
    const uint32_t accumulate = added;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\ntcgen05.mma.cta_group::1.kind::f8f6f4 [%0], %1, %2, %3, p;\n}" ::"r"(d), "l"(a), "l"(b), "r"(instruction), "r"(accumulate) : "memory");
}
// The same of up to 8 bits, 32 elements of a row, each 32 with a scale, whose words lie in SCALES_COLUMNS columns. Of E2M1 16 elements take 16 bytes
// too: 8 bytes of codes, and 8 that count for nothing.
__device__ __forceinline__ void tensor_multiply_scaled(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, uint32_t a_scales, uint32_t b_scales, bool added) {
    const uint32_t accumulate = added;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\ntcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32 [%0], %1, %2, %3, [%4], [%5], p;\n}" ::"r"(d), "l"(a), "l"(b), "r"(instruction), "r"(a_scales), "r"(b_scales), "r"(accumulate) : "memory");
}
// The same of E2M1 alone, 64 elements of a row, two a byte, each 16 with a scale of E4M3.
__device__ __forceinline__ void tensor_multiply_fp4(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, uint32_t a_scales, uint32_t b_scales, bool added) {
    const uint32_t accumulate = added;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\ntcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%0], %1, %2, %3, [%4], [%5], p;\n}" ::"r"(d), "l"(a), "l"(b), "r"(instruction), "r"(a_scales), "r"(b_scales), "r"(accumulate) : "memory");
}
// Copies 128 rows' words of scales from shared memory to where products that this thread begins later take them.
__device__ __forceinline__ void tensor_copy_scales(uint32_t columns, uint32_t from) {
    asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(columns), "l"(tensor_describe(from, 0, 128, 0)) : "memory");
}
// Has the barrier completed when all products of this thread so far are done, and what they read may be written over.
__device__ __forceinline__ void tensor_commit(uint64_t* barrier) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Begins to load 16 columns: a warp's lane gets those of tensor memory's lane, counted from the address' on. Of each four warps the first has lanes
// 0 to 31, the next 32 to 63 and so on, and no others.
__device__ __forceinline__ void tensor_load(float (&r)[16], uint32_t address) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x16.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, [%16];"
                 : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]), "=f"(r[4]), "=f"(r[5]), "=f"(r[6]), "=f"(r[7]), "=f"(r[8]), "=f"(r[9]), "=f"(r[10]), "=f"(r[11]), "=f"(r[12]), "=f"(r[13]), "=f"(r[14]), "=f"(r[15])
                 : "r"(address)
                 : "memory");
}
// Waits for what this warp loads. Nothing reads the results before.
__device__ __forceinline__ void tensor_loaded(float (&r)[16]) {
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+f"(r[i])::"memory");
}
#endif
#endif

#ifdef RUDDER_TCGEN05
// A block's place in tensor memory, and a barrier for each stage's products. All threads make, and drop, them together.
template <int SLOTS, int COLUMNS>
struct Products {
    uint64_t* done;
    uint32_t address;

    __device__ __forceinline__ Products() {
        __shared__ uint64_t barriers[SLOTS];
        __shared__ uint32_t place;
        if (threadIdx.x < WARP) tensor_allocate<COLUMNS>(&place);
        if (threadIdx.x < SLOTS) barrier_init(barriers + threadIdx.x);
        tensor_before_sync();
        __syncthreads();
        tensor_after_sync();
        done = barriers, address = place;
    }
    __device__ __forceinline__ void commit(int step) const { tensor_commit(done + step % SLOTS); }
    // Waits for the products of a step; all threads do, of one step after another.
    __device__ __forceinline__ void wait(int step) const {
        barrier_wait(done + step % SLOTS, step / SLOTS % 2);
        tensor_after_sync();
    }
    // Where this thread's feature lies, of columns from `column` on: warps 0 and 4 have lanes 0 to 31 and so on.
    __device__ __forceinline__ uint32_t lanes(int column) const { return address + column + (threadIdx.x / WARP % 4 * WARP << 16); }
    __device__ __forceinline__ void drop() const {
        tensor_before_sync();
        __syncthreads();
        tensor_after_sync();
        if (threadIdx.x < WARP) tensor_free<COLUMNS>(address);
    }
};
#endif

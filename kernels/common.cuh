// What all kernels share: number formats, reductions, asynchronous copies and the tensor cores' instructions.
//
// The same sources compile for the GPU (nvcc) and, with RUDDER_EMULATE, as plain C++ that runs a block's
// threads as fibers (emulate/): so every kernel is tested where there is no GPU.
#pragma once

#ifdef RUDDER_EMULATE
#include "emulate/cuda.h"
#else
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

typedef __nv_bfloat16 bf16;
typedef __nv_fp8_e4m3 e4m3;

#define KERNEL(name)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ float to_float(e4m3 x) { return static_cast<float>(x); }
// To the nearest, ties to even; what is too large becomes 448.
__device__ __forceinline__ e4m3 to_e4m3(float x) { return e4m3(x); }

// Two numbers to E2M1, to the nearest, ties to even, and 6 at most; `low` in the lower half of a byte. Blackwell alone does it.
__device__ __forceinline__ uint32_t to_e2m1(float low, float high) {
    uint32_t byte;
    asm("{\n.reg .b8 both;\ncvt.rn.satfinite.e2m1x2.f32 both, %1, %2;\ncvt.u32.u8 %0, both;\n}" : "=r"(byte) : "f"(high), "f"(low));
    return byte;
}

// 16 bytes that are read once and that no kernel writes meanwhile: they need no place in the first cache, and the compiler may
// read them early.
__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// The same as load_once, but read where it stands: ptxas moves what is read as constant (.nc) behind a wait.
__device__ __forceinline__ uint4 load_ahead(const void* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

// What a kernel waits by that may begin while the one before it still runs (programmatic dependent launch; which may, and behind what, says
// crates/cuda/src/dependent_launch.rs). All its threads call this, on every path, before they read what any kernel wrote and before they write:
// then the kernel before has ended, all before that one too, since it waited or was launched plainly, and what they wrote is there. Until then a
// kernel may read weights alone, which no kernel writes. From here on the next kernel may be brought up: only now, so that two run at a time and
// no more. Where a kernel was launched plainly there is nothing to wait for.
__device__ __forceinline__ void grid_dependency_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Copies 16 bytes, or 8, from global to shared memory without waiting; writes zeros where `valid` is false.
template <int BYTES = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(bytes), "n"(BYTES) : "memory");
}
// Closes a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest `PENDING` groups have arrived.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of bf16 from shared memory: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared) {
    uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}
// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* shared) {
    uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}
// d += a * b on the tensor cores: a is 16x16, b 16x8, both bf16, d f32.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// 2^x to two units of the last place; what is subnormal becomes zero.
__device__ __forceinline__ float fast_exp2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
// Products of two pairs of bf16, rounded; subnormal numbers count.
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    uint32_t products;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(products) : "r"(a), "r"(b));
    return products;
}
// Differences of two pairs of bf16, rounded.
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    uint32_t differences;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(differences) : "r"(a), "r"(b));
    return differences;
}

// A word that other GPUs and the host write: what its writer did before is to be seen after.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
// A word that other GPUs and the host read: what was done before is to be seen by who sees it.
__device__ __forceinline__ void store_release(uint32_t* to, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ unsigned long long nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Of an address of several devices' memory (multicast): the sum of what lies there on all of them, which the switch between them adds up in an
// order of its own. Nothing else may read or write there.
__device__ __forceinline__ float4 multimem_sum(const float4* from) {
    float4 v;
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
// Writes to all of them.
__device__ __forceinline__ void multimem_store(float4* to, float4 v) {
    asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// Orders what was done before and what is done after by different addresses of the same memory.
__device__ __forceinline__ void fence_alias() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// Emulated ranks share a processor: who waits lets others run.
__device__ __forceinline__ void yield_host() {}
#endif

#define WARP 32
#define FULL 0xffffffffu
#define NEG_INFINITY (-__builtin_huge_valf())
#define FP8_BLOCK 128  // elements of a row of activations in FP8 that share a scale
#define FP8_LARGEST 448.0f

// Two floats as bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    union {
        bf16 h[2];
        uint32_t w;
    } u;
    u.h[0] = to_bf16(low);
    u.h[1] = to_bf16(high);
    return u.w;
}

// Four numbers of E4M3, without its NaN, to bf16, in order. A number's seven lower bits lie where a bf16's exponent and mantissa meet, so
// that but for a power of two it is its number, subnormals too.
__device__ __forceinline__ void widen_e4m3(uint32_t codes, uint32_t* to) {
#pragma unroll
    for (int p = 0; p < 2; p++) {
        // Each byte above a byte of zeros.
        const uint32_t apart = __byte_perm(codes, 0, p ? 0x3424 : 0x1404);
        to[p] = multiply_pairs((apart & 0x80008000u) | (apart >> 4 & 0x07f007f0u), 0x7b807b80u);  // 2^120
    }
}

// The lower (or upper) halves of two words, side by side.
__device__ __forceinline__ uint32_t halves(uint32_t a, uint32_t b, bool upper) {
    return upper ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16);
}

// An element of activations, which are f32 or bf16.
__device__ __forceinline__ float load(const void* data, int is_f32, size_t i) {
    return is_f32 ? static_cast<const float*>(data)[i] : to_float(static_cast<const bf16*>(data)[i]);
}

// The sum over a warp, the same in all lanes.
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

// The sum over a block of whole warps, the same in all threads.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[WARP];
    x = warp_sum(x);
    __syncthreads();  // the parts of an earlier sum have been read
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) sum += parts[w];
    return sum;
}

// CUDA's language and the instructions that the kernels use, in plain C++ for the CPU.
//
// A block's threads are fibers (emulate.cpp): they run one at a time until they wait for their warp or block, so
// that a barrier that not all reach shows as a deadlock, and a kernel's result is that of its source. Blocks run their
// threads in different orders, so that races between barriers show as other results. What this cannot show: memory
// ordering, the compiler and the hardware.
//
// Every thread of the host has a device of its own, so that kernels of several ranks run at the same time and can wait for each other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <sched.h>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static __thread
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct bf16 {
    uint16_t bits;
};
struct e4m3 {
    uint8_t bits;
};

inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline bf16 to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return {0x7fff};
    bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    return {static_cast<uint16_t>(bits >> 16)};
}

inline float to_float(e4m3 x) {
    const int exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
    const float magnitude = (x.bits & 127) == 127 ? NAN : exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return x.bits & 128 ? -magnitude : magnitude;
}
inline e4m3 to_e4m3(float f) {
    const uint8_t sign = std::signbit(f) ? 128 : 0;
    if (f != f) return {0x7f};
    const float magnitude = fabsf(f);
    if (magnitude >= 448) return {static_cast<uint8_t>(sign | 0x7e)};
    int exponent;
    frexpf(magnitude, &exponent);  // magnitude is below 2^exponent
    const int last = magnitude < 0.015625f ? -9 : exponent - 4;  // of the last bit that is kept
    const int units = static_cast<int>(nearbyintf(ldexpf(magnitude, -last)));  // to nearest, ties to even
    // One number after another, over the borders of exponents.
    return {static_cast<uint8_t>(sign | (units + 8 * (last + 9)))};
}

// The magnitudes of E2M1 in the order of their codes.
const float E2M1_NUMBERS[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
inline uint32_t to_e2m1(float f) {
    int nearest = 7;  // of what is no number too
    for (int code = 6; code >= 0; code--) {
        const float off = fabsf(fabsf(f) - E2M1_NUMBERS[code]), least = fabsf(fabsf(f) - E2M1_NUMBERS[nearest]);
        if (off < least || (off == least && code % 2 == 0)) nearest = code;  // ties to even
    }
    return nearest | (f < 0.0f ? 8 : 0);
}
inline uint32_t to_e2m1(float low, float high) { return to_e2m1(low) | to_e2m1(high) << 4; }

// ---- the scheduler's side (emulate.cpp) ----

extern __thread dim3 threadIdx, blockIdx, blockDim, gridDim;
// Waits until all of the block's threads, or all of the warp's, are here.
void __syncthreads();
void wait_for_warp();
// What the 32 lanes of the running thread's warp show each other: 64 bytes each.
unsigned char (*lane_slots())[64];
unsigned char* dynamic_shared();
void fail(const char* what);
// Kernels run one after another here; but that all threads wait which have to is seen.
void grid_dependency_wait();

inline unsigned lane() { return threadIdx.x % 32; }

#define DYNAMIC_SHARED(name) unsigned char* const name = dynamic_shared()

struct Kernel {
    Kernel* next;
    const char* name;
    unsigned arguments;
    void (*call)(void** arguments);
    static Kernel*& first() {
        static Kernel* head = nullptr;
        return head;
    }
    Kernel(const char* name, unsigned arguments, void (*call)(void**)) : next(first()), name(name), arguments(arguments), call(call) {
        first() = this;
    }
};
template <typename... A>
constexpr unsigned count(void (*)(A...)) { return sizeof...(A); }

template <typename... A, std::size_t... I>
void call_with(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}
template <typename... A>
void call_with(void (*kernel)(A...), void** arguments) {
    call_with(kernel, arguments, std::index_sequence_for<A...>());
}
#define KERNEL(name) static Kernel kernel_##name(#name, count(name), [](void** arguments) { call_with(name, arguments); });

// ---- warps ----

inline void __syncwarp(unsigned = 0xffffffffu) { wait_for_warp(); }

// Every lane shows `mine`; returns lane `from`'s.
template <typename T>
T exchange(const T& mine, unsigned from) {
    static_assert(sizeof(T) <= 64, "a lane's slot");
    memcpy(lane_slots()[lane()], &mine, sizeof(T));
    wait_for_warp();
    T theirs;
    memcpy(&theirs, lane_slots()[from % 32], sizeof(T));
    wait_for_warp();
    return theirs;
}
template <typename T>
T __shfl_sync(unsigned, T x, int from) { return exchange(x, from); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) { return exchange(x, lane() ^ mask); }
template <typename T>
T __shfl_up_sync(unsigned, T x, unsigned delta) { return exchange(x, lane() < delta ? lane() : lane() - delta); }
inline unsigned __ballot_sync(unsigned, bool holds) {
    memcpy(lane_slots()[lane()], &holds, sizeof holds);
    wait_for_warp();
    unsigned ballot = 0;
    for (int l = 0; l < 32; l++) ballot |= static_cast<unsigned>(lane_slots()[l][0] != 0) << l;
    wait_for_warp();
    return ballot;
}

// ---- arithmetic ----

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
inline float __uint_as_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t x; memcpy(&x, &f, 4); return x; }
inline float fast_exp2(float x) { return exp2f(x); }
inline int __float2int_rn(float f) { return static_cast<int>(nearbyintf(f)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return r;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
// Fibers take turns at barriers only, so that nothing comes between.
template <typename T, typename U> T atomicAdd(T* at, U x) { T old = *at; *at = old + static_cast<T>(x); return old; }
template <typename T, typename U> T atomicMin(T* at, U x) { T old = *at; if (static_cast<T>(x) < old) *at = x; return old; }

inline uint4 load_once(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("a load of 16 bytes that is not aligned");
    uint4 v;
    memcpy(&v, from, 16);
    return v;
}
inline uint4 load_ahead(const void* from) { return load_once(from); }

// ---- other devices and the host: threads of this process ----

inline uint32_t load_acquire(const uint32_t* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline void store_release(uint32_t* to, uint32_t v) { __atomic_store_n(to, v, __ATOMIC_RELEASE); }
inline unsigned long long nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<unsigned long long>(now.tv_sec) * 1000000000u + static_cast<unsigned long long>(now.tv_nsec);
}
inline void yield_host() { sched_yield(); }
// Addresses of several devices' memory at once, which Rust's side maps (emulate.cpp).
float4 multimem_sum(const float4* from);
void multimem_store(float4* to, float4 v);
inline void fence_alias() {}

// ---- copies that arrive as early or as late as the kernel allows ----

void copy_async_bytes(void* shared, const void* global, unsigned bytes, bool valid);
template <int BYTES = 16> void copy_async(void* shared, const void* global, bool valid) { copy_async_bytes(shared, global, BYTES, valid); }
void copy_commit();
void copy_wait_for(int pending);
template <int PENDING> void copy_wait() { copy_wait_for(PENDING); }

// ---- tensor cores; fragments as in the PTX manual ----

// Two neighbouring elements of row lane / 4 (or, transposed, of column lane / 4) of four matrices.
inline void matrices(uint32_t (&r)[4], const void* shared, bool transposed) {
    const void* rows[32];
    memcpy(lane_slots()[lane()], &shared, sizeof shared);
    wait_for_warp();
    for (int l = 0; l < 32; l++) memcpy(&rows[l], lane_slots()[l], sizeof rows[l]);
    wait_for_warp();
    if (reinterpret_cast<uintptr_t>(shared) % 16) fail("ldmatrix of a row that is not aligned to 16 bytes");
    for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
            unsigned row = transposed ? lane() % 4 * 2 + i : lane() / 4;
            unsigned column = transposed ? lane() / 4 : lane() % 4 * 2 + i;
            pair[i] = static_cast<const uint16_t*>(rows[m * 8 + row])[column];
        }
        memcpy(&r[m], pair, 4);
    }
}
inline void load_matrices(uint32_t (&r)[4], const void* shared) { matrices(r, shared, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared) { matrices(r, shared, true); }

inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    uint32_t products = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float x = to_float(bf16{static_cast<uint16_t>(a >> shift)}), y = to_float(bf16{static_cast<uint16_t>(b >> shift)});
        products |= static_cast<uint32_t>(to_bf16(x * y).bits) << shift;
    }
    return products;
}

inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    uint32_t differences = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float x = to_float(bf16{static_cast<uint16_t>(a >> shift)}), y = to_float(bf16{static_cast<uint16_t>(b >> shift)});
        differences |= static_cast<uint32_t>(to_bf16(x - y).bits) << shift;
    }
    return differences;
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct { uint32_t a[4], b[2]; } mine;
    memcpy(mine.a, a, sizeof mine.a);
    memcpy(mine.b, b, sizeof mine.b);
    const auto slots = lane_slots();
    memcpy(slots[lane()], &mine, sizeof mine);
    wait_for_warp();
    auto half = [slots](unsigned owner, unsigned word, unsigned i) {
        return to_float(bf16{static_cast<uint16_t>(reinterpret_cast<const uint32_t*>(slots[owner])[word] >> (i % 2 * 16))});
    };
    for (int i = 0; i < 4; i++) {
        unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (unsigned k = 0; k < 16; k++) {
            // a: registers 0 and 1 hold rows r and r + 8 of k below 8, 2 and 3 those of the others. b's two come behind them.
            float x = half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
            sum += x * half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
        d[i] += sum;
    }
    wait_for_warp();
}

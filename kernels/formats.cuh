// Weights narrower than bf16: how 16 bytes of their codes, and the scales beside them, become numbers.
//
// A matrix of a format is two arrays: `codes`, rows of k elements in 16-byte pieces, and `scales`, rows of `stride` bytes. A format has
//   COLUMNS     elements of a piece
//   PACKED      true; false of plain bf16, which has none of the others
//   SCALED      whether its numbers are still to be multiplied with factor(scale), in f32, where a sum over one scale's columns ends
//   scale(..)   what a piece needs of its row's scales
//   numbers(..) a piece as bf16, two a word, in order; exact
//   ROW_SCALED  whether a whole row's numbers are still to be multiplied with row_factor(its scales)
#pragma once
#include "common.cuh"

// Pairs of bf16 times a factor, rounded.
template <int WORDS>
__device__ __forceinline__ void scale_pairs(uint32_t (&to)[WORDS], float factor) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) to[i] = pack(__uint_as_float(to[i] << 16) * factor, __uint_as_float(to[i] & 0xffff0000u) * factor);
}

// Eight codes of E2M1 to bf16, two a word. A code's exponent and mantissa lie where a bf16's lowest ones do, so that but for a power of
// two it is its number, subnormals too; `scales` is a pair that makes up for it. Elements 2p and 2p + 1 are nibbles p and p + 4.
__device__ __forceinline__ void widen_e2m1(uint32_t codes, uint32_t scales, uint32_t* to) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const uint32_t numbers = p < 2 ? codes << (6 - 4 * p) : codes >> (4 * p - 6);
        to[p] = multiply_pairs((codes << (12 - 4 * p) & 0x80008000u) | (numbers & 0x01c001c0u), scales);
    }
}

// Bf16 as it is.
struct Plain {
    static constexpr int COLUMNS = 8;
    static constexpr bool PACKED = false;
    static constexpr bool ROW_SCALED = false;
};

// MXFP4 (OCP Microscaling Formats 1.0): a scale is a byte e for 32 elements, a factor of 2^(e - 127); e is 128 at most.
struct Mxfp4 {
    static constexpr int COLUMNS = 32;
    static constexpr bool PACKED = true;
    static constexpr bool SCALED = false;
    static constexpr bool ROW_SCALED = false;
    __device__ static uint32_t scale(const unsigned char* scales, int column, int) { return scales[column / 32]; }
    __device__ static float factor(uint32_t) { return 1.0f; }
    __device__ static void numbers(uint4 codes, uint32_t e, uint32_t (&to)[16]) {
        // 2^(e - 1), since numbers come out 2^126 times too small.
        const uint32_t pair = (e + 126) * 0x00800080u;
        widen_e2m1(codes.x, pair, to), widen_e2m1(codes.y, pair, to + 4), widen_e2m1(codes.z, pair, to + 8), widen_e2m1(codes.w, pair, to + 12);
    }
};

// FP8, E4M3: a scale is an f32 for 64 << shift elements.
struct Fp8 {
    static constexpr int COLUMNS = 16;
    static constexpr bool PACKED = true;
    static constexpr bool SCALED = true;
    static constexpr bool ROW_SCALED = false;
    __device__ static uint32_t scale(const unsigned char* scales, int column, int shift) { return reinterpret_cast<const uint32_t*>(scales)[column / 64 >> shift]; }
    __device__ static float factor(uint32_t scale) { return __uint_as_float(scale); }
    __device__ static void numbers(uint4 codes, uint32_t, uint32_t (&to)[8]) {
        widen_e4m3(codes.x, to), widen_e4m3(codes.y, to + 2), widen_e4m3(codes.z, to + 4), widen_e4m3(codes.w, to + 6);
    }
};

// Four-bit integers: a scale is a word for 128 << shift elements, an f32 but for its five lowest bits, which are the zero point. Of each eight
// codes 2p and 2p + 1 are nibbles p and p + 4 of a word.
struct Int4 {
    static constexpr int COLUMNS = 32;
    static constexpr bool PACKED = true;
    static constexpr bool SCALED = true;
    static constexpr bool ROW_SCALED = false;
    __device__ static uint32_t scale(const unsigned char* scales, int column, int shift) { return reinterpret_cast<const uint32_t*>(scales)[column / 128 >> shift]; }
    __device__ static float factor(uint32_t word) { return __uint_as_float(word & ~31u); }
    __device__ static void numbers(uint4 codes, uint32_t word, uint32_t (&to)[16]) {
        // A code in the lowest bits of 128 is 128 more than itself: less as much more than the zero point, it is a number, exactly.
        const uint32_t base = 0x43004300u, zero = base + (word & 31) * 0x00010001u, words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int i = 0; i < 16; i++) to[i] = subtract_pairs((words[i / 4] >> (4 * (i % 4)) & 0x000f000fu) | base, zero);
    }
};

// NVFP4 (arXiv:2509.25149): a scale is E4M3 for 16 elements; before a row's scales lies the factor of all, an f32.
struct Nvfp4 {
    static constexpr int COLUMNS = 32;
    static constexpr bool PACKED = true;
    static constexpr bool SCALED = false;
    static constexpr bool ROW_SCALED = true;
    __device__ static uint32_t scale(const unsigned char* scales, int column, int) { return *reinterpret_cast<const uint16_t*>(scales + 4 + column / 16); }
    __device__ static float factor(uint32_t) { return 1.0f; }
    // Numbers come out 2^8 times too small.
    __device__ static float row_factor(const unsigned char* scales) { return *reinterpret_cast<const float*>(scales) * 256.0f; }
    __device__ static void numbers(uint4 codes, uint32_t pair, uint32_t (&to)[16]) {
        // A code's and a scale's significant bits are six together, so that their product is exact. As widen_e4m3's a scale is 2^120 times too
        // small at first; here it becomes 2^118 times too large.
        const uint32_t half = 0x7b007b00u;  // 2^119
        const uint32_t first = multiply_pairs(multiply_pairs((pair & 0x7f) * 0x00100010u, half), half);
        const uint32_t second = multiply_pairs(multiply_pairs((pair >> 8 & 0x7f) * 0x00100010u, half), half);
        widen_e2m1(codes.x, first, to), widen_e2m1(codes.y, first, to + 4), widen_e2m1(codes.z, second, to + 8), widen_e2m1(codes.w, second, to + 12);
    }
};

// A piece as bf16 with its scale, rounded once; of a format whose rows are scaled without that.
template <class F>
__device__ __forceinline__ void widen_piece(uint4 codes, uint32_t scale, uint32_t (&to)[F::COLUMNS / 2]) {
    F::numbers(codes, scale, to);
    if constexpr (F::SCALED) scale_pairs(to, F::factor(scale));
}

// Shared memory as the tensor cores read it by themselves: addresses, and matrices in the canonical layouts and swizzles of the PTX manual's
// chapters on shared memory's matrix layout.
//
// Addresses of shared memory are counted from where the block's dynamic part begins.
#pragma once
#include "cuda.h"

// Blackwell's products fail that begin while a thread has not published copies that arrived.
void publish_shared();
inline uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - dynamic_shared());
}

// A matrix in shared memory, as its descriptor has it.
struct SharedMatrix {
    uint32_t begin, leading, stride;  // bytes
    uint32_t bits, width;             // bytes of a row of the swizzle's pattern: 128, 64, 32; 16 without one

    // What descriptors of Hopper and Blackwell have in common; `bits` as above.
    SharedMatrix(uint64_t descriptor, uint32_t bits)
        : begin((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4), stride((descriptor >> 32 & 0x3fff) << 4), bits(bits), width(1u << bits) {
        if (descriptor >> 49 & 7) fail("a matrix with a base offset, which the emulation does not know");
        // The pattern is of eight rows; a matrix may begin anywhere within its first.
        if (width > 16 && begin % (8 * width) >= width) fail("a matrix that does not begin with the swizzle's pattern");
    }
    // Where an address leads: bits 4 to 6, as many as pieces of 16 bytes make a row, are exchanged by bits 7 to 9.
    const unsigned char* byte(uint32_t linear) const { return dynamic_shared() + (linear ^ ((linear >> 7 & (width / 16 - 1)) << 4)); }
    // Byte `along` of row (or column) i: elements along k lie side by side.
    const unsigned char* k_major_byte(uint32_t i, uint32_t along) const {
        // In pieces of 16 bytes ((8, m), 2) : ((width, stride), 1), without a swizzle ((8, m), 2) : ((1, stride), leading)
        return byte(begin + i % 8 * width + i / 8 * stride + (width > 16 ? along : along / 16 * leading + along % 16));
    }
    // Element k of it.
    template <class T>
    float k_major(uint32_t i, uint32_t k) const {
        T x;
        memcpy(&x, k_major_byte(i, k * sizeof(T)), sizeof x);
        return to_float(x);
    }
    // The same where elements along i lie side by side.
    float mn_major(uint32_t i, uint32_t k) const {
        // ((width, m), (8, 2)) : ((1, leading), (width, stride)), without a swizzle ((8, m), (8, 2)) : ((1, stride), (16 bytes, leading))
        const uint32_t within = i * 2 & (width - 1), panel = i * 2 >> bits;
        bf16 x;
        memcpy(&x, byte(begin + within + k % 8 * width + (width > 16 ? panel * leading + k / 8 * stride : panel * stride + k / 8 * leading)), sizeof x);
        return to_float(x);
    }
};

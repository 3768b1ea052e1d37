// Products of warpgroups as the PTX manual defines them: descriptors, canonical layouts and swizzles as in its chapter on shared memory's
// matrix layout. A product is done when its group is waited for, as late as it may be, out of what shared memory holds then.
//
// Addresses of shared memory are counted from where the block's dynamic part begins. What is not shown: which writes a fence makes visible.
#pragma once
#include "cuda.h"

#include <functional>

#define RUDDER_WGMMA

void products_push(std::function<void()> product);
void products_commit();
void products_wait_for(int pending);
template <int PENDING> void products_wait() { products_wait_for(PENDING); }
inline void products_begin() { wait_for_warp(); }
inline void publish_shared() {}
template <int COLUMNS> void products_done(float (&)[COLUMNS][4]) {}
inline uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - dynamic_shared());
}

// A matrix in shared memory by its descriptor.
struct SharedMatrix {
    uint32_t begin, leading, stride;  // bytes
    uint32_t bits, width;             // bytes of a row of the swizzle's pattern: 128, 64, 32; 16 without one

    explicit SharedMatrix(uint64_t descriptor)
        : begin((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4), stride((descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 49 & 7) fail("a matrix with a base offset, which the emulation does not know");
        const uint32_t bits_of[] = {4, 7, 6, 5};
        bits = bits_of[descriptor >> 62], width = 1u << bits;
        // The pattern is of eight rows; a matrix may begin anywhere within its first.
        if (width > 16 && begin % (8 * width) >= width) fail("a matrix that does not begin with the swizzle's pattern");
    }
    // Bits 4 to 6 of an address, as many as pieces of 16 bytes make a row, exchanged by bits 7 to 9.
    template <class T>
    float at(uint32_t linear) const {
        const uint32_t address = linear ^ ((linear >> 7 & (width / 16 - 1)) << 4);
        T x;
        memcpy(&x, dynamic_shared() + address, sizeof x);
        return to_float(x);
    }
    // Element k of row (or column) i: elements along k lie side by side.
    template <class T>
    float k_major(uint32_t i, uint32_t k) const {
        // In pieces of 16 bytes ((8, m), 2) : ((width, stride), 1), without a swizzle ((8, m), 2) : ((1, stride), leading)
        const uint32_t along = k * sizeof(T);
        return at<T>(begin + i % 8 * width + i / 8 * stride + (width > 16 ? along : along / 16 * leading + along % 16));
    }
    // The same where elements along i lie side by side.
    float mn_major(uint32_t i, uint32_t k) const {
        // ((width, m), (8, 2)) : ((1, leading), (width, stride)), without a swizzle ((8, m), (8, 2)) : ((1, stride), (16 bytes, leading))
        const uint32_t within = i * 2 & (width - 1), panel = i * 2 >> bits;
        return at<bf16>(begin + within + k % 8 * width + (width > 16 ? panel * leading + k / 8 * stride : panel * stride + k / 8 * leading));
    }
};

// What of the result a thread has.
inline unsigned product_row(int i) { return threadIdx.x % 128 / 32 * 16 + lane() / 4 + i / 2 * 8; }
inline unsigned product_column(int c, int i) { return c * 8 + lane() % 4 * 2 + i % 2; }

// A product of 32 bytes of elements of rows, of both matrices.
template <class T, int COLUMNS>
void multiply_k_major(float (&d)[COLUMNS][4], uint64_t a, uint64_t b, bool added) {
    constexpr int DEPTH = 32 / sizeof(T);
    wait_for_warp();
    products_push([&d, a, b, added] {
        const SharedMatrix left(a), right(b);
        float rows[2][DEPTH];
        for (int k = 0; k < DEPTH; k++)
            for (int r = 0; r < 2; r++) rows[r][k] = left.k_major<T>(product_row(2 * r), k);
        for (int c = 0; c < COLUMNS; c++)
            for (int column = 0; column < 2; column++) {
                float sums[2] = {};
                for (int k = 0; k < DEPTH; k++) {
                    const float x = right.k_major<T>(product_column(c, column), k);
                    for (int r = 0; r < 2; r++) sums[r] += rows[r][k] * x;
                }
                for (int r = 0; r < 2; r++) d[c][2 * r + column] = sums[r] + (added ? d[c][2 * r + column] : 0.0f);
            }
    });
}
template <int COLUMNS>
void multiply_rows(float (&d)[COLUMNS][4], uint64_t a, uint64_t b, bool added) { multiply_k_major<bf16>(d, a, b, added); }
inline void multiply_rows_fp8(float (&d)[16][4], uint64_t a, uint64_t b, bool added) { multiply_k_major<e4m3>(d, a, b, added); }

template <int COLUMNS>
void add_weighted(float (&d)[COLUMNS][4], const uint32_t (&a)[4], uint64_t b) {
    struct Rows {
        float of[2][16];
    } rows;
    // Register 0 holds elements 2 * quad and that + 1 of the first row, 1 of the second; 2 and 3 those 8 further on.
    struct Fragment {
        uint32_t a[4];
    } mine;
    memcpy(mine.a, a, sizeof mine.a);
    for (unsigned quad = 0; quad < 4; quad++) {
        const Fragment theirs = exchange(mine, lane() / 4 * 4 + quad);
        for (int i = 0; i < 8; i++) {
            const uint16_t bits = static_cast<uint16_t>(theirs.a[i / 2] >> i % 2 * 16);
            rows.of[i / 2 % 2][i / 4 * 8 + quad * 2 + i % 2] = to_float(bf16{bits});
        }
    }
    products_push([&d, rows, b] {
        const SharedMatrix right(b);
        for (int c = 0; c < COLUMNS; c++)
            for (int column = 0; column < 2; column++) {
                float sums[2] = {};
                for (int k = 0; k < 16; k++) {
                    const float x = right.mn_major(product_column(c, column), k);
                    for (int r = 0; r < 2; r++) sums[r] += rows.of[r][k] * x;
                }
                for (int r = 0; r < 2; r++) d[c][2 * r + column] += sums[r];
            }
    });
}

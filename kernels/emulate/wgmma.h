// Products of warpgroups as the PTX manual defines them. A product is done at once or, as late as it may be, when its group is waited for, out of what
// shared memory holds then. What is not shown: which writes a fence makes visible.
#pragma once
#include "panels.h"

#include <functional>

#define RUDDER_WGMMA

void products_push(std::function<void()> product);
void products_commit();
void products_wait_for(int pending);
template <int PENDING> void products_wait() { products_wait_for(PENDING); }
inline void products_begin() { wait_for_warp(); }
template <int COLUMNS> void products_done(float (&)[COLUMNS][4]) {}

inline SharedMatrix wgmma_matrix(uint64_t descriptor) {
    const uint32_t bits_of[] = {4, 7, 6, 5};
    return {descriptor, bits_of[descriptor >> 62]};
}

// What of the result a thread has.
inline unsigned product_row(int i) { return threadIdx.x % 128 / 32 * 16 + lane() / 4 + i / 2 * 8; }
inline unsigned product_column(int c, int i) { return c * 8 + lane() % 4 * 2 + i % 2; }

// A product of 32 bytes of elements of rows, of both matrices.
template <class T, int COLUMNS>
void multiply_k_major(float (&d)[COLUMNS][4], uint64_t a, uint64_t b, bool added) {
    constexpr int DEPTH = 32 / sizeof(T);
    wait_for_warp();
    products_push([&d, a, b, added] {
        const SharedMatrix left = wgmma_matrix(a), right = wgmma_matrix(b);
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
        const SharedMatrix right = wgmma_matrix(b);
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

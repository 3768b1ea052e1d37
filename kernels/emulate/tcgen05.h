// Blackwell's tensor cores and tensor memory as the PTX manual defines them. Products are done at once or, as late as the kernel allows, when a thread
// waits for the barrier that a commit has them complete; loads at once or when they are waited for. Tensor memory holds NaN at first, and lies
// elsewhere than at 0.
//
// What fails beside wrong descriptors: tensor memory that was not allocated or is not given back; lanes that are not the warp's; what follows a
// barrier without a fence, or loads that come before one without; products that begin while copies that arrived are not published, or
// that nobody waited for. What is not shown: plain stores to shared memory that no fence publishes.
#pragma once
#include "panels.h"

#include <functional>

#define RUDDER_TCGEN05

// A word of tensor memory, which must have been allocated.
uint32_t& tensor_word(unsigned lane, unsigned column);
// Notes that the running thread does something in tensor memory, of this kind.
void tensor_use();
// Something asynchronous that a commit tracks; the copies of all threads have to be published.
void tensor_push(std::function<void()> operation);
void tensor_commit(uint64_t* barrier);
void barrier_init(uint64_t* barrier);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void tensor_allocate_columns(uint32_t* address, unsigned columns);
void tensor_free_columns(uint32_t address, unsigned columns);
void tensor_before_sync();
void tensor_after_sync();
void tensor_load_later(std::function<void()> load);
void tensor_load_now();

// Any lane may be elected: the one that the kernel expects least.
inline bool elected() {
    wait_for_warp();
    return lane() == 31;
}
template <int COLUMNS> void tensor_allocate(uint32_t* address) {
    wait_for_warp();
    if (lane() == 0) tensor_allocate_columns(address, COLUMNS);
    wait_for_warp();
}
template <int COLUMNS> void tensor_free(uint32_t address) {
    wait_for_warp();
    if (lane() == 0) tensor_free_columns(address, COLUMNS);
}

inline SharedMatrix tensor_matrix(uint64_t descriptor) {
    const uint32_t bits_of[] = {4, 0, 7, 0, 6, 0, 5, 0};
    const uint32_t bits = bits_of[descriptor >> 61];
    if ((descriptor >> 46 & 7) != 1 || descriptor >> 52 & 0x1ff || bits == 0) fail("a descriptor that is none of Blackwell's, or that the emulation does not know");
    return {descriptor, bits};
}

// d = a * b, or added to it: `elements` of 32 bytes of rows of a and b, each as a function reads them of its matrix.
template <class A, class B>
void tensor_product(uint32_t d, int rows_of_b, int elements, bool added, A a, B b) {
    if (d >> 16) fail("a product of 128 rows that does not begin in lane 0");
    for (int j = 0; j < rows_of_b; j++) {
        float row[64];
        for (int k = 0; k < elements; k++) row[k] = b(j, k);
        for (int i = 0; i < 128; i++) {
            uint32_t& word = tensor_word(i, d + j);
            float sum = added ? __uint_as_float(word) : 0.0f;
            for (int k = 0; k < elements; k++) sum += a(i, k) * row[k];
            word = __float_as_uint(sum);
        }
    }
}

// The number of b's rows, of an instruction's descriptor that must have these bits beside.
inline int tensor_rows_of_b(uint32_t instruction, uint32_t others) {
    const int rows = static_cast<int>(instruction >> 17 & 63) * 8;
    if ((instruction & ~(63u << 17)) != others || rows % 16 || rows == 0 || rows > 256) fail("an instruction descriptor that the product does not take");
    return rows;
}

inline void tensor_multiply(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool added) {
    const SharedMatrix left = tensor_matrix(a), right = tensor_matrix(b);
    // Sums of f32, bf16 times bf16, 128 rows.
    const bool by_columns = instruction >> 16 & 1;
    const int rows = tensor_rows_of_b(instruction & ~(1u << 16), 1u << 4 | 1u << 7 | 1u << 10 | 8u << 24);
    tensor_push([=] {
        float of_a[128][16];
        for (int i = 0; i < 128; i++)
            for (int k = 0; k < 16; k++) of_a[i][k] = left.k_major<bf16>(i, k);
        tensor_product(d, rows, 16, added, [&](int i, int k) { return of_a[i][k]; }, [&](int j, int k) { return by_columns ? right.mn_major(j, k) : right.k_major<bf16>(j, k); });
    });
}

inline float e2m1(uint8_t code) { return code & 8 ? -E2M1_NUMBERS[code & 7] : E2M1_NUMBERS[code & 7]; }

// Products of 8 bits' elements; E2M1 as 16 codes of four bits and 8 bytes that count for nothing.
inline float narrow_element(const SharedMatrix& matrix, uint32_t format, int row, int k) {
    if (format == FORMAT_E4M3) return matrix.k_major<e4m3>(row, k);
    if (format != FORMAT_E2M1) fail("elements of a format that the emulation does not know");
    const uint8_t code = *matrix.k_major_byte(row, k / 16 * 16 + k % 16 / 2) >> k % 2 * 4 & 15;
    return e2m1(code);
}
// Calls `scale(row, word's byte)` for what a block's elements are multiplied with beside.
template <class A, class B>
void tensor_multiply_narrow(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, int rows, bool added, A scale_a, B scale_b) {
    const SharedMatrix left = tensor_matrix(a), right = tensor_matrix(b);
    const uint32_t of_left = instruction >> 7 & 7, of_right = instruction >> 10 & 7;
    tensor_push([=] {
        float of_a[128][32];
        for (int i = 0; i < 128; i++)
            for (int k = 0; k < 32; k++) of_a[i][k] = narrow_element(left, of_left, i, k) * scale_a(i);
        tensor_product(d, rows, 32, added, [&](int i, int k) { return of_a[i][k]; }, [&](int j, int k) { return narrow_element(right, of_right, j, k) * scale_b(j); });
    });
}
inline void tensor_multiply_fp8(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool added) {
    const int rows = tensor_rows_of_b(instruction & ~(63u << 7), 1u << 4 | 8u << 24);
    const auto none = [](int) { return 1.0f; };
    tensor_multiply_narrow(d, a, b, instruction, rows, added, none, none);
}
inline void tensor_multiply_scaled(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, uint32_t a_scales, uint32_t b_scales, bool added) {
    const uint32_t block_a = instruction >> 29 & 3, block_b = instruction >> 4 & 3;
    const int rows = tensor_rows_of_b(instruction & ~(63u << 7 | 3u << 29 | 3u << 4), 1u << 23 | 1u << 27);
    // A row's scales lie in its own quarter of the lanes as in the others.
    const auto scale = [](uint32_t columns, uint32_t block) {
        return [=](int row) {
            const uint32_t e = tensor_word(row, columns + row / 32) >> 8 * block & 0xff;
            return e == 0xff ? NAN : ldexpf(1.0f, static_cast<int>(e) - 127);
        };
    };
    tensor_multiply_narrow(d, a, b, instruction, rows, added, scale(a_scales, block_a), scale(b_scales, block_b));
}
inline void tensor_multiply_fp4(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, uint32_t a_scales, uint32_t b_scales, bool added) {
    const SharedMatrix left = tensor_matrix(a), right = tensor_matrix(b);
    const int rows = tensor_rows_of_b(instruction, 1u << 7 | 1u << 10 | 1u << 27);
    // Element k is of half a byte, and of a quarter of the row's word.
    const auto element = [](const SharedMatrix& matrix, uint32_t columns, int row, int k) {
        const uint8_t scale = tensor_word(row, columns + row / 32) >> k / 16 * 8;
        if (scale & 128) fail("a scale of E4M3 with a sign");
        return e2m1(*matrix.k_major_byte(row, k / 2) >> k % 2 * 4 & 15) * to_float(e4m3{scale});
    };
    tensor_push([=] {
        float of_a[128][64];
        for (int i = 0; i < 128; i++)
            for (int k = 0; k < 64; k++) of_a[i][k] = element(left, a_scales, i, k);
        tensor_product(d, rows, 64, added, [&](int i, int k) { return of_a[i][k]; }, [&](int j, int k) { return element(right, b_scales, j, k); });
    });
}
inline void tensor_copy_scales(uint32_t columns, uint32_t from) {
    const SharedMatrix matrix = tensor_matrix(tensor_describe(from, 0, 128, 0));
    tensor_push([=] {
        for (int lane = 0; lane < 128; lane++)
            for (int column = 0; column < 4; column++) memcpy(&tensor_word(lane, columns + column), matrix.k_major_byte(lane % 32, column * 4), 4);
    });
}

inline void tensor_load(float (&r)[16], uint32_t address) {
    wait_for_warp();
    tensor_use();
    if (address >> 16 != threadIdx.x / 32 % 4 * 32) fail("a load from lanes that are not the warp's");
    for (float& x : r) x = NAN;
    float* const to = r;
    tensor_load_later([to, address] {
        for (unsigned i = 0; i < 16; i++) to[i] = __uint_as_float(tensor_word((address >> 16) + lane(), (address & 0xffff) + i));
    });
}
inline void tensor_loaded(float (&)[16]) {
    wait_for_warp();
    tensor_load_now();
}

// How rows of matrices lie in shared memory for the tensor cores of Hopper (wgmma) and Blackwell (tcgen05), which read them by themselves.
#pragma once
#include "common.cuh"

// Rows lie in panels as wide as a swizzle, 128 bytes or 64, a row after another; of each eight rows the 16-byte pieces are
// exchanged so that reads along a row and down a column find different banks. What is exchanged depends on the address, so that panels must
// begin where the pattern does, every 1024 bytes. PTX ISA, "Shared Memory Matrix Layout" and "Canonical Layouts".
template <int DIM, int ROWS, int SIZE = 2>
struct Panels {
    static constexpr int WIDTH = (DIM * SIZE % 128 ? 64 : 128) / SIZE;  // elements, of SIZE bytes
    static constexpr int ROW = WIDTH * SIZE;                            // bytes
    static constexpr int PANEL = ROWS * ROW;
    static constexpr int BYTES = DIM / WIDTH * PANEL;
    static_assert(DIM % WIDTH == 0 && PANEL % 1024 == 0, "whole panels and patterns");

    // The byte where 16 bytes begin, of a row's elements from `element` on.
    static __device__ __forceinline__ int place(int row, int element) {
        const int linear = element / WIDTH * PANEL + row * ROW + element % WIDTH * SIZE;
        return linear ^ ((linear >> 7 & (ROW / 16 - 1)) << 4);
    }
    // The byte where a descriptor lets 32 bytes of columns begin, of rows from `row` on, a multiple of 8: as if nothing were exchanged.
    static __device__ __forceinline__ int begin(int row, int first) { return first / WIDTH * PANEL + row * ROW + first % WIDTH * SIZE; }
};

#ifdef RUDDER_EMULATE
#include "emulate/panels.h"
#else
// An address as descriptors have it.
__device__ __forceinline__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// What this thread wrote to shared memory is seen by products that begin after the next barrier.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

// Where panels may begin in a block's shared memory.
__device__ __forceinline__ unsigned char* first_panel(unsigned char* memory) { return memory + (1024 - shared_address(memory) % 1024) % 1024; }

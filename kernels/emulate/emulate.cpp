// Runs kernels on the CPU: a block after another, its threads as fibers that take turns at barriers. All state is the calling thread's.
//
// Between two barriers each fiber runs alone as far as it comes, in an order that is drawn for each block: warps and the lanes of one forwards or
// backwards, and what goes on beside the threads (copies, products) done as early or as late as the hardware may do it. So a kernel where a barrier or
// a wait is missing gives another result in some blocks. The draw is the same in each run; RUDDER_EMULATE_SEED=1, 2, .. draws others.
#include "emulate/cuda.h"

#include <csetjmp>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <ucontext.h>
#include <vector>

#include "../rows.cu"
#include "../matmul.cu"
#include "../matmul_fp8.cu"
#include "../matmul_fp8_tcgen05.cu"
#include "../matmul_tcgen05.cu"
#include "../matmul_wgmma.cu"
#include "../attention.cu"
#include "../attention_wgmma.cu"
#include "../attention_tcgen05.cu"
#include "../moe.cu"
#include "../sample.cu"
#include "../collectives.cu"

__thread dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

enum State { READY, AT_WARP, AT_BLOCK, AT_BARRIER, DONE };
const std::size_t STACK = 256 * 1024;

struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
    bool valid;
};
struct Fiber {
    State state;
    bool begun;   // it has run a thread before, and waits for the next
    bool waited;  // for the kernel before
    jmp_buf at;
    std::unique_ptr<unsigned char[]> stack;
    std::vector<std::vector<Copy>> groups;  // copies under way, the last group still open
    std::vector<std::vector<std::function<void()>>> products;  // products under way, the same
    bool unpublished;                                          // copies arrived that other units may not see yet
    // Blackwell's: what is not committed yet; loads under way; which fences are due; the barrier that is waited for.
    std::vector<std::function<void()>> operations, loads;
    bool fence_after_due, fence_before_due;
    uint64_t* barrier;
    uint32_t parity;
};

// What a commit has completed.
struct Commit {
    std::vector<std::function<void()>> operations;
    uint64_t* barrier;
};

const unsigned TENSOR_COLUMNS = 512;

thread_local std::vector<Fiber> fibers;
thread_local std::vector<unsigned char> shared_memory;
// The block's tensor memory, which of its columns are allocated, its barriers and how often each was completed, commits under way.
thread_local std::vector<uint32_t> tensor_memory;
__thread unsigned tensor_begin, tensor_end;
thread_local std::map<uint64_t*, unsigned> barriers;
thread_local std::deque<Commit> commits;
__thread unsigned char slots[32][32][64];
__thread jmp_buf scheduler;
__thread unsigned running;
__thread void (*kernel)(void**);
__thread void** kernel_arguments;
__thread const char* kernel_name = "";
__thread bool kernel_waits;  // for the one before
__thread uint64_t launches;

// The order that a block's threads run in, and when what goes on beside them is done.
struct Order {
    bool warps_backwards, lanes_backwards, early;
};
__thread Order order;

uint64_t seed() {
    static const char* const given = getenv("RUDDER_EMULATE_SEED");
    static const uint64_t seed = given ? strtoull(given, nullptr, 10) : 0;
    return seed;
}

// splitmix64 (Steele, Lea, Flood 2014): bits of a number that look like chance.
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

void draw_order() {
    const uint64_t block = blockIdx.x + static_cast<uint64_t>(gridDim.x) * (blockIdx.y + static_cast<uint64_t>(gridDim.y) * blockIdx.z);
    const uint64_t drawn = mix(mix(mix(seed()) + launches) + block);
    order = {(drawn & 1) != 0, (drawn & 2) != 0, (drawn & 4) != 0};
}

void place(unsigned thread) {
    running = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

void leave(State state) {
    Fiber& fiber = fibers[running];
    fiber.state = state;
    if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
}

// A fiber runs a thread of one block after another: to begin one takes two system calls.
void body() {
    for (;;) {
        kernel(kernel_arguments);
        if (kernel_waits && !fibers[running].waited) fail("a thread ends that has not waited for the kernel before");
        leave(DONE);
    }
}

void resume(unsigned thread) {
    place(thread);
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    setcontext(&context);
}

// Lets the threads from `begin` to `end` go on if all that still run wait at `barrier`.
bool release(unsigned begin, unsigned end, State barrier) {
    bool any = false;
    for (unsigned t = begin; t < end; t++) {
        if (fibers[t].state == barrier) any = true;
        else if (fibers[t].state != DONE) return false;
    }
    for (unsigned t = begin; any && t < end; t++)
        if (fibers[t].state == barrier) fibers[t].state = READY;
    return any;
}

// Whether a barrier was completed as a thread waits for it; has commits done that lead there, and those before them.
bool completed(uint64_t* barrier, uint32_t parity) {
    const auto found = barriers.find(barrier);
    if (found == barriers.end()) fail("a barrier that was not made");
    if (found->second % 2 != parity) return true;
    bool leads = false;
    for (const Commit& commit : commits) leads |= commit.barrier == barrier;
    while (leads) {
        const Commit commit = std::move(commits.front());
        commits.pop_front();
        for (const auto& operation : commit.operations) operation();
        barriers[commit.barrier]++;
        leads = commit.barrier != barrier;
    }
    return found->second % 2 != parity;
}

void begin_block(unsigned threads) {
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        fiber.state = READY;
        fiber.waited = fiber.unpublished = fiber.fence_after_due = fiber.fence_before_due = false;
        fiber.groups.assign(1, {});
        fiber.products.assign(1, {});
        fiber.operations.clear(), fiber.loads.clear();
    }
    barriers.clear();
}

// Lets a warp's threads run until none can go on; whether any did.
bool run_warp(unsigned begin, unsigned end) {
    bool moved = false;
    do {
        for (unsigned i = begin; i < end; i++) {
            const unsigned t = order.lanes_backwards ? begin + end - 1 - i : i;
            if (fibers[t].state == READY) resume(t), moved = true;
        }
    } while (release(begin, end, AT_WARP));
    return moved;
}

void run_block(unsigned threads) {
    begin_block(threads);
    draw_order();
    const unsigned warps = (threads + 31) / 32;
    for (;;) {
        bool moved = false;
        unsigned done = 0;
        for (unsigned i = 0; i < warps; i++) {
            const unsigned begin = (order.warps_backwards ? warps - 1 - i : i) * 32;
            moved |= run_warp(begin, begin + 32 < threads ? begin + 32 : threads);
        }
        for (unsigned t = 0; t < threads; t++) {
            done += fibers[t].state == DONE;
            if (fibers[t].state == AT_BARRIER && completed(fibers[t].barrier, fibers[t].parity)) fibers[t].state = READY, moved = true;
        }
        if (done == threads) {
            if (tensor_begin < tensor_end) fail("tensor memory that is not given back");
            return;
        }
        if (!release(0, threads, AT_BLOCK) && !moved) fail("deadlock: threads wait for a barrier that others do not reach");
    }
}

// Addresses that reach the memory of several devices at once, and where that begins on each.
struct Multicast {
    uintptr_t begin, bytes;
    std::vector<unsigned char*> memory;
};
std::vector<Multicast> multicasts;
std::shared_mutex multicasts_lock;

// Calls `use` with where the 16 bytes at a multicast address lie on each device, in turn.
template <class Use>
void on_each_device(const void* at, Use use) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(at);
    if (address % 16) fail("a multicast access of 16 bytes that is not aligned");
    std::shared_lock<std::shared_mutex> lock(multicasts_lock);
    for (const Multicast& multicast : multicasts) {
        if (address - multicast.begin >= multicast.bytes) continue;
        for (unsigned char* memory : multicast.memory) use(memory + (address - multicast.begin));
        return;
    }
    fail("a multicast access of an address that is none");
}

}  // namespace

void fail(const char* what) {
    fprintf(stderr, "emulated kernel %s, block (%u, %u, %u), thread %u: %s\n", kernel_name, blockIdx.x, blockIdx.y,
            blockIdx.z, running, what);
    abort();
}

void __syncthreads() {
    if (fibers[running].fence_before_due) fail("a barrier behind loads of tensor memory, and no fence between");
    fibers[running].fence_after_due = true;
    leave(AT_BLOCK);
}
void wait_for_warp() { leave(AT_WARP); }
unsigned char (*lane_slots())[64] { return slots[running / 32]; }
unsigned char* dynamic_shared() { return shared_memory.data() + (16 - reinterpret_cast<uintptr_t>(shared_memory.data()) % 16) % 16; }

void grid_dependency_wait() { fibers[running].waited = true; }

void products_push(std::function<void()> product) {
    if (order.early) return product();
    fibers[running].products.back().push_back(std::move(product));
}
void products_commit() { fibers[running].products.emplace_back(); }
void products_wait_for(int pending) {
    auto& groups = fibers[running].products;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (const auto& product : groups.front()) product();
        groups.erase(groups.begin());
    }
    wait_for_warp();
}

void land(const Copy& copy) { copy.valid ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes); }
void copy_async_bytes(void* shared, const void* global, unsigned bytes, bool valid) {
    if (reinterpret_cast<uintptr_t>(shared) % bytes || (valid && reinterpret_cast<uintptr_t>(global) % bytes))
        fail("a copy of 8 or 16 bytes that is not aligned");
    const Copy copy = {shared, global, bytes, valid};
    if (order.early) land(copy);
    fibers[running].groups.back().push_back(copy);
}
void copy_commit() { fibers[running].groups.emplace_back(); }
void copy_wait_for(int pending) {
    auto& groups = fibers[running].groups;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        if (!order.early)
            for (const Copy& copy : groups.front()) land(copy);
        fibers[running].unpublished |= !groups.front().empty();
        groups.erase(groups.begin());
    }
}
void publish_shared() { fibers[running].unpublished = false; }

uint32_t& tensor_word(unsigned lane, unsigned column) {
    if (lane >= 128 || column < tensor_begin || column >= tensor_end) fail("tensor memory that is not allocated");
    return tensor_memory[lane * TENSOR_COLUMNS + column];
}
void tensor_allocate_columns(uint32_t* address, unsigned columns) {
    if (columns < 32 || columns > TENSOR_COLUMNS || columns & (columns - 1) || tensor_begin < tensor_end) fail("an allocation of tensor memory that the emulation does not know");
    tensor_memory.assign(128 * TENSOR_COLUMNS, 0xffffffff);
    tensor_end = TENSOR_COLUMNS, tensor_begin = *address = tensor_end - columns;
}
void tensor_free_columns(uint32_t address, unsigned columns) {
    tensor_use();
    if (address != tensor_begin || columns != tensor_end - tensor_begin) fail("tensor memory that was not allocated so is given back");
    bool idle = commits.empty();
    for (const Fiber& fiber : fibers) idle &= fiber.operations.empty() && fiber.loads.empty();
    if (!idle) fail("tensor memory is given back while it is used");
    tensor_begin = tensor_end;
}
void tensor_before_sync() { fibers[running].fence_before_due = false; }
void tensor_after_sync() { fibers[running].fence_after_due = false; }
void tensor_use() {
    if (fibers[running].fence_after_due) fail("tensor memory is used behind a barrier, and no fence between");
}
void tensor_push(std::function<void()> operation) {
    tensor_use();
    for (const Fiber& fiber : fibers)
        if (fiber.state != DONE && fiber.unpublished) fail("a product begins, and copies are not published");
    if (order.early) return operation();
    fibers[running].operations.push_back(std::move(operation));
}
void tensor_commit(uint64_t* barrier) {
    if (!barriers.count(barrier)) fail("a barrier that was not made");
    if (order.early) {
        barriers[barrier]++;
        return;
    }
    commits.push_back({std::move(fibers[running].operations), barrier});
    fibers[running].operations.clear();
}
void barrier_init(uint64_t* barrier) { barriers[barrier] = 0; }
void barrier_wait(uint64_t* barrier, uint32_t parity) {
    while (!completed(barrier, parity)) {
        fibers[running].barrier = barrier, fibers[running].parity = parity;
        leave(AT_BARRIER);
    }
    fibers[running].fence_after_due = true;
}
void tensor_load_later(std::function<void()> load) {
    fibers[running].fence_before_due = true;
    if (order.early) return load();
    fibers[running].loads.push_back(std::move(load));
}
void tensor_load_now() {
    for (const auto& load : fibers[running].loads) load();
    fibers[running].loads.clear();
}

float4 multimem_sum(const float4* from) {
    float4 sum;
    bool first = true;
    on_each_device(from, [&](const unsigned char* at) {
        float4 part;
        memcpy(&part, at, sizeof part);
        sum = first ? part : float4{sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
        first = false;
    });
    return sum;
}
void multimem_store(float4* to, float4 v) {
    on_each_device(to, [&](unsigned char* at) { memcpy(at, &v, sizeof v); });
}

// Makes addresses multicast ones, or, without memory, no longer so. Sums are taken in the memory's order.
extern "C" void rudder_multicast(uint64_t begin, uint64_t bytes, const uint64_t* memory, unsigned count) {
    std::unique_lock<std::shared_mutex> lock(multicasts_lock);
    for (auto multicast = multicasts.begin(); multicast != multicasts.end(); ++multicast)
        if (multicast->begin == begin) {
            multicasts.erase(multicast);
            break;
        }
    if (count == 0) return;
    multicasts.push_back({begin, bytes, {}});
    for (unsigned i = 0; i < count; i++) multicasts.back().memory.push_back(reinterpret_cast<unsigned char*>(memory[i]));
}

// Runs a kernel, which may be one that waits for the kernel before; 0 if there is one of that name.
extern "C" int rudder_emulate(const char* name, const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
                              unsigned count, bool waits) {
    Kernel* found = Kernel::first();
    while (found && strcmp(found->name, name)) found = found->next;
    if (!found) return 1;
    if (!grid) return 0;
    kernel = found->call;
    kernel_name = found->name;
    kernel_waits = waits;
    launches++;
    if (count != found->arguments) fail("more or fewer arguments than the kernel has");
    if (grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) fail("a grid larger than the hardware's");
    kernel_arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    unsigned threads = block[0] * block[1] * block[2];
    if (threads == 0 || threads > 1024) fail("a block of no or more than 1024 threads");
    if (shared > 227 * 1024) fail("more shared memory than a multiprocessor has");
    while (fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack.reset(new unsigned char[STACK]);
    }
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                // What a block finds in shared memory is never what another left there.
                shared_memory.assign(shared + 16, 0xff);
                run_block(threads);
            }
    return 0;
}

// Runs CUDA kernels on a CPU for the tests: thread by thread, one block after another.
//
// Every thread of a block is a fiber with a stack of its own. It runs until it waits: at a barrier for the block, in a
// warp operation for its 31 neighbours. What goes wrong on a GPU without a word ends a launch with a message here:
//   * a barrier or warp operation that not all threads reach, or that threads reach in different places;
//   * writing behind the shared memory that the launch asked for;
//   * ldmatrix and cp.async on addresses that are not aligned or not shared memory.
// Shared memory holds NaN when a block begins. A cp.async copies when it is waited for, not before. `simt_reverse(1)` runs
// threads and blocks from the last to the first: a barrier that is missing shows in one of the two orders.
// What it cannot show: the rounding and the order of sums inside a tensor core, speed, and races between blocks.

#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "types.h"

namespace simt {

constexpr unsigned MOST_THREADS = 1024, LANES = 32;
constexpr size_t STACK = 256 << 10, MOST_SHARED = 227 << 10, GUARD = 4 << 10;
constexpr int LAUNCH_FAILURE = 719, INVALID_CONFIGURATION = 9;

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Thread {
    dim3 index;
    unsigned id = 0;
    bool left = false;
    const char* where = nullptr;  // it waits in this operation
    int line = 0;
    jmp_buf place;
    ucontext_t context;
    std::vector<std::vector<Copy>> groups;  // of cp.async, not yet waited for; the last is still open
};

// A place where `members` threads wait for each other; `round` counts how often they met.
struct Meeting {
    unsigned arrived = 0, round = 0;
    const char* where = nullptr;
    int line = 0;
};

struct Warp {
    Meeting meeting;
    alignas(16) unsigned char slots[2][LANES][32];
};

inline Thread threads[MOST_THREADS];
inline Warp warps[MOST_THREADS / LANES];
inline Meeting barrier;
inline Thread* now = nullptr;
inline unsigned count = 0, alive = 0, idle = 0;
inline bool reverse = false;
inline std::function<void()> work;
inline std::string failure;
inline jmp_buf home;
inline ucontext_t home_context;
inline dim3 block_index, block_size, grid_size;
inline size_t shared_bytes = 0;
alignas(128) inline unsigned char shared[MOST_SHARED + GUARD];

[[noreturn]] inline void fail(const std::string& message) {
    failure = message;
    _longjmp(home, 2);
}

inline std::string place_of(const Thread& t) {
    std::string name = "thread " + std::to_string(t.id);
    if (t.left) return name + " has left the kernel";
    return name + " waits in " + (t.where ? t.where : "nothing") + ", line " + std::to_string(t.line);
}

inline Thread* following(Thread* t) {
    unsigned id = t->id;
    do id = reverse ? (id + count - 1) % count : (id + 1) % count;
    while (threads[id].left);
    return &threads[id];
}

// Lets the next thread run, until this one has its turn again.
__attribute__((noinline)) inline void pass_on() {
    if (++idle > count) {  // everybody had a turn and nobody got anywhere
        Thread* other = std::find_if(threads, threads + count, [](Thread& t) {
            return t.left || t.line != now->line || strcmp(t.where, now->where) != 0;
        });
        fail("threads wait for each other for ever: " + place_of(*now) + "; " +
             place_of(other == threads + count ? threads[0] : *other));
    }
    Thread* from = now;
    now = following(from);
    if (now != from && !_setjmp(from->place)) _longjmp(now->place, 1);
}

inline void meet(Meeting& meeting, unsigned members, const char* where, int line) {
    now->where = where, now->line = line;
    if (meeting.arrived && (strcmp(meeting.where, where) != 0 || meeting.line != line))
        fail("threads meet in different operations: " + place_of(*now) + "; others wait in " + meeting.where + ", line " +
             std::to_string(meeting.line));
    meeting.where = where, meeting.line = line, idle = 0;
    unsigned round = meeting.round;
    if (++meeting.arrived == members)
        meeting.arrived = 0, ++meeting.round;
    else
        while (meeting.round == round) pass_on();
    now->where = nullptr;
}

// What each lane of the warp has brought. Valid until the lane's next operation: slots alternate.
template <class T>
const T* exchange(const T& mine, const char* where, int line) {
    static_assert(sizeof(T) <= sizeof warps[0].slots[0][0], "slots are small");
    Warp& warp = warps[now->id / LANES];
    T* slots = reinterpret_cast<T*>(warp.slots[warp.meeting.round & 1]);
    slots[now->id % LANES] = mine;
    meet(warp.meeting, LANES, where, line);
    return slots;
}

inline void all_lanes(uint32_t mask) {
    if (mask != 0xffffffffu) fail("warp operations here take all lanes, got a mask");
}

// A fiber: prepared by `prepare`, then the kernel once for each block.
inline void fiber() {
    Thread* me = now;
    if (!_setjmp(me->place)) _longjmp(home, 1);
    for (;;) {
        work();
        me->left = true, idle = 0;
        if (!_setjmp(me->place)) {
            if (!--alive) _longjmp(home, 1);
            now = following(me);
            _longjmp(now->place, 1);
        }
    }
}

__attribute__((noinline)) inline void prepare(unsigned id) {
    static unsigned char* stacks = static_cast<unsigned char*>(
        mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    now = &threads[id];
    getcontext(&now->context);
    now->context.uc_stack.ss_sp = stacks + id * STACK;
    now->context.uc_stack.ss_size = STACK;
    now->context.uc_link = nullptr;
    makecontext(&now->context, fiber, 0);
    if (!_setjmp(home)) setcontext(&now->context);
}

__attribute__((noinline)) inline bool run_block() {
    for (unsigned id = 0; id < count; ++id) threads[id].left = false, threads[id].groups.assign(1, {});
    std::fill_n(warps, MOST_THREADS / LANES, Warp{});
    barrier = {}, alive = count, idle = 0;
    memset(shared, 0xff, shared_bytes + GUARD);
    now = &threads[reverse ? count - 1 : 0];
    int how = _setjmp(home);
    if (how == 0) _longjmp(now->place, 1);
    if (how == 2) return false;
    bool intact = std::all_of(shared + shared_bytes, shared + shared_bytes + GUARD, [](auto x) { return x == 0xff; });
    if (!intact) failure = "the block wrote behind its " + std::to_string(shared_bytes) + " bytes of shared memory";
    return intact;
}

inline int run_grid() {
    failure.clear();
    count = block_size.x * block_size.y * block_size.z;
    if (count == 0 || count > MOST_THREADS || count % LANES || shared_bytes > MOST_SHARED) {
        failure = "a block must have 32, 64, .. 1024 threads and at most 227 KiB, got " + std::to_string(count) +
                  " and " + std::to_string(shared_bytes) + " bytes";
        return INVALID_CONFIGURATION;
    }
    for (unsigned id = 0; id < count; ++id) {
        threads[id].id = id;
        threads[id].index = {id % block_size.x, id / block_size.x % block_size.y, id / block_size.x / block_size.y};
        prepare(id);
    }
    size_t blocks = size_t{grid_size.x} * grid_size.y * grid_size.z;
    for (size_t i = 0; i < blocks; ++i) {
        size_t at = reverse ? blocks - 1 - i : i;
        block_index = dim3(at % grid_size.x, at / grid_size.x % grid_size.y, at / grid_size.x / grid_size.y);
        if (!run_block()) return LAUNCH_FAILURE;
    }
    return 0;
}

inline void check_address(const void* pointer, bool is_shared, const char* where) {
    auto at = reinterpret_cast<uintptr_t>(pointer), begin = reinterpret_cast<uintptr_t>(shared);
    if (at % 16) fail(std::string(where) + ": an address must be a multiple of 16 bytes");
    if (is_shared && (at < begin || at + 16 > begin + shared_bytes))
        fail(std::string(where) + ": an address lies outside the block's shared memory");
}

}  // namespace simt

#define threadIdx (simt::now->index)
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void*, A... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    simt::grid_size = grid, simt::block_size = block, simt::shared_bytes = smem;
    simt::work = [=] { kernel(static_cast<P>(args)...); };
    return simt::run_grid();
}

inline char* shared_memory() { return reinterpret_cast<char*>(simt::shared); }

#define SIMT_LINE int line = __builtin_LINE()

inline void __syncthreads(SIMT_LINE) { simt::meet(simt::barrier, simt::count, "__syncthreads", line); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_LINE) {
    simt::all_lanes(mask);
    simt::exchange(0, "__syncwarp", line);
}

template <class T>
T __shfl_sync(uint32_t mask, T x, int lane, int = 32, SIMT_LINE) {
    simt::all_lanes(mask);
    return simt::exchange(x, "__shfl_sync", line)[lane & 31];
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int lanes, int = 32, SIMT_LINE) {
    simt::all_lanes(mask);
    return simt::exchange(x, "__shfl_xor_sync", line)[(simt::now->id ^ lanes) & 31];
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, unsigned lanes, int = 32, SIMT_LINE) {
    simt::all_lanes(mask);
    const T* slots = simt::exchange(x, "__shfl_up_sync", line);
    unsigned lane = simt::now->id & 31;
    return lane < lanes ? x : slots[lane - lanes];
}
template <class T>
T __shfl_down_sync(uint32_t mask, T x, unsigned lanes, int = 32, SIMT_LINE) {
    simt::all_lanes(mask);
    const T* slots = simt::exchange(x, "__shfl_down_sync", line);
    unsigned lane = simt::now->id & 31;
    return lane + lanes > 31 ? x : slots[lane + lanes];
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_LINE) {
    simt::all_lanes(mask);
    const int* slots = simt::exchange(predicate, "__ballot_sync", line);
    uint32_t bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= uint32_t{slots[lane] != 0} << lane;
    return bits;
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_LINE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(uint32_t mask, int predicate, SIMT_LINE) { return __ballot_sync(mask, predicate, line) == 0xffffffffu; }

template <class T>
T atomicAdd(T* at, T x) {
    T old = *at;
    *at = old + x;
    return old;
}
template <class T>
T atomicMax(T* at, T x) {
    T old = *at;
    *at = max(old, x);
    return old;
}
template <class T>
T __ldg(const T* at) { return *at; }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __float_as_uint(float x) { return simt_bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return simt_bits<float>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float fast_exp2(float x) { return exp2f(x); }

inline void cp_async_16(void* to, const void* from, bool valid = true) {
    simt::check_address(to, true, "cp_async_16");
    simt::check_address(from, false, "cp_async_16");
    simt::now->groups.back().push_back({to, from, valid});
}
inline void cp_async_commit() { simt::now->groups.emplace_back(); }
template <int LATER>
void cp_async_wait() {
    auto& groups = simt::now->groups;  // the last is not committed yet
    for (; groups.size() > size_t{LATER} + 1; groups.erase(groups.begin()))
        for (const simt::Copy& copy : groups.front())
            copy.valid ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
}

// Both loads: the lane's two elements of each matrix, whose rows lie where lanes 8j .. 8j + 7 say.
inline void simt_ldmatrix(uint32_t (&out)[4], const void* row, bool transposed, const char* where, int line) {
    simt::check_address(row, true, where);
    auto rows = simt::exchange(static_cast<const uint16_t*>(row), where, line);
    unsigned lane = simt::now->id & 31, g = lane / 4, t = lane % 4 * 2;
    for (int j = 0; j < 4; ++j) {
        uint32_t low = transposed ? rows[8 * j + t][g] : rows[8 * j + g][t];
        uint32_t high = transposed ? rows[8 * j + t + 1][g] : rows[8 * j + g][t + 1];
        out[j] = low | high << 16;
    }
}
inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, SIMT_LINE) {
    simt_ldmatrix(out, row, false, "ldmatrix_x4", line);
}
inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row, SIMT_LINE) {
    simt_ldmatrix(out, row, true, "ldmatrix_x4_trans", line);
}

template <class T>
uint32_t pack2(float low, float high);
template <>
inline uint32_t pack2<__half>(float low, float high) {
    return __float2half_rn(low).bits | uint32_t{__float2half_rn(high).bits} << 16;
}
template <>
inline uint32_t pack2<__nv_bfloat16>(float low, float high) {
    return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}

inline float simt_element(__half, uint32_t both, int high) { return __half2float({static_cast<uint16_t>(both >> 16 * high)}); }
inline float simt_element(__nv_bfloat16, uint32_t both, int high) {
    return __bfloat162float({static_cast<uint16_t>(both >> 16 * high)});
}

// Register r of lane 4g + t as device.h describes it: a[r] has row g + 8 (r & 1), columns 2t + 8 (r >> 1) and the next;
// b[r] has rows 2t + 8r and the next, column g.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_LINE) {
    struct Fragments { uint32_t a[4], b[2]; };
    auto lanes = simt::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, "mma_m16n8k16", line);
    unsigned lane = simt::now->id & 31, g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
        unsigned column = 2 * t + (i & 1);
        double sum = d[i];
        for (unsigned k = 0; k < 16; ++k) {
            unsigned holder = k % 8 / 2, half = k / 8;
            sum += double{simt_element(T{}, lanes[4 * g + holder].a[2 * half + i / 2], k & 1)} *
                   double{simt_element(T{}, lanes[4 * column + holder].b[half], k & 1)};
        }
        d[i] = static_cast<float>(sum);
    }
}

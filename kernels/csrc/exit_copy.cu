// States of a batch between two decoder layers: rows that left, rows that go on (parlance_kernels/exit_copy).
//
// Ladder (times: not measured yet, no GPU has run it)
//   1  A warp a row, 16 bytes a lane where addresses and width allow. The table, the copies that leave and the rows
//      that go on are written by one launch, and a state that leaves is read once for both of its places.
//   2  Backward: places of the rows first (a scatter of indices), then every row gathers what it is owed. No atomics, so
//      the sum has one order; one rounding for up to three addends.
//   3  Compaction in one block: each warp owns a stretch and counts it by ballot; two passes over flags, one barrier.
//      Blocks that look back at each other would only pay far above 64k rows.

#include "device.h"

constexpr int THREADS = 256, WARPS = THREADS / 32;

static dim3 a_warp_each(int64_t rows) { return dim3(static_cast<unsigned>((rows + WARPS - 1) / WARPS)); }

// The widest unit that divides every address and the bytes of a row.
static uint64_t unit_of(uint64_t bits) { return bits & 15 ? bits & (~bits + 1) : 16; }
static uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// next_UD = [table rows 0 .. frozen, out rows left, out rows stays]; left_ND = out rows left. Rows of `width` units.
template <class Unit>
__global__ void __launch_bounds__(THREADS)
    exit_copy_rows(const Unit* table, const Unit* out, const int64_t* left, const int64_t* stays, Unit* next,
                   Unit* left_rows, int64_t frozen, int64_t n_left, int64_t n_stays, int64_t width) {
    int64_t row = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
    if (row >= frozen + n_left + n_stays) return;
    const Unit* from = table + row * width;
    Unit* second = nullptr;
    int64_t i = row - frozen;
    if (i >= 0) {
        from = out + (i < n_left ? left[i] : stays[i - n_left]) * width;
        if (i < n_left) second = left_rows + i * width;
    }
    for (int64_t c = threadIdx.x % 32; c < width; c += 32) {
        Unit value = from[c];
        next[row * width + c] = value;
        if (second) second[c] = value;
    }
}

extern "C" int parlance_exit_copy(const void* table, const void* out, const int64_t* left, const int64_t* stays, void* next,
                                  void* left_rows, int64_t frozen, int64_t n_left, int64_t n_stays, int64_t row_bytes,
                                  void* stream) {
    uint64_t unit = unit_of(row_bytes | address(table) | address(out) | address(next) | address(left_rows));
    auto start = [&](auto sample) {
        using Unit = decltype(sample);
        return launch(exit_copy_rows<Unit>, a_warp_each(frozen + n_left + n_stays), THREADS, 0, stream,
                      static_cast<const Unit*>(table), static_cast<const Unit*>(out), left, stays,
                      static_cast<Unit*>(next), static_cast<Unit*>(left_rows), frozen, n_left, n_stays,
                      row_bytes / static_cast<int64_t>(sizeof(Unit)));
    };
    return unit == 16 ? start(uint4{}) : unit >= 4 ? start(uint32_t{}) : start(uint16_t{});
}

// place_2A[0][row] = i where left[i] is the row, place_2A[1][row] = j where stays[j] is; others keep their -1.
__global__ void __launch_bounds__(THREADS)
    exit_copy_places(const int64_t* left, const int64_t* stays, int* place, int64_t n_left, int64_t n_stays, int64_t rows) {
    int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (i < n_left)
        place[left[i]] = static_cast<int>(i);
    else if (i < n_left + n_stays)
        place[rows + stays[i - n_left]] = static_cast<int>(i - n_left);
}

// Rows 0 .. U of the table's gradient, then rows 0 .. A of the output's. One warp a row.
template <class T>
__global__ void __launch_bounds__(THREADS)
    exit_copy_gradients(const T* d_next, const T* d_left, const int* place, T* d_table, T* d_out, int64_t frozen,
                        int64_t n_left, int64_t states, int64_t rows, int64_t width, int64_t detach) {
    int64_t row = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
    if (row >= states + rows) return;
    const T* owed[3] = {nullptr, nullptr, nullptr};
    T* to = d_table + row * width;
    if (row < states) {
        if (row < frozen) owed[0] = d_next + row * width;
    } else {
        row -= states;
        to = d_out + row * width;
        int left = place[row], stays = place[rows + row];
        if (left >= 0) owed[0] = d_left + left * width;
        if (left >= 0 && !detach) owed[1] = d_next + (frozen + left) * width;
        if (stays >= 0) owed[2] = d_next + (frozen + n_left + stays) * width;
    }
    for (int64_t c = threadIdx.x % 32; c < width; c += 32) {
        float sum = 0;
        for (const T* from : owed)
            if (from) sum += to_float(from[c]);
        to[c] = from_float<T>(sum);
    }
}

extern "C" int parlance_exit_copy_backward(const void* d_next, const void* d_left, const int64_t* left,
                                           const int64_t* stays, int* place, void* d_table, void* d_out, int64_t frozen,
                                           int64_t n_left, int64_t n_stays, int64_t states, int64_t rows, int64_t width,
                                           int64_t detach, int64_t dtype, void* stream) {
    dim3 grid(static_cast<unsigned>((n_left + n_stays + THREADS - 1) / THREADS));
    int error = launch(exit_copy_places, grid, THREADS, 0, stream, left, stays, place, n_left, n_stays, rows);
    if (error) return error;
    auto start = [&](auto sample) {
        using T = decltype(sample);
        return launch(exit_copy_gradients<T>, a_warp_each(states + rows), THREADS, 0, stream,
                      static_cast<const T*>(d_next), static_cast<const T*>(d_left), place, static_cast<T*>(d_table),
                      static_cast<T*>(d_out), frozen, n_left, states, rows, width, detach);
    };
    switch (dtype) {
        case FLOAT32: return start(float{});
        case FLOAT16: return start(__half{});
        case BFLOAT16: return start(__nv_bfloat16{});
        default: return INVALID_VALUE;
    }
}

constexpr int BLOCK = 1024;

// rows = [where flag, where not], each ascending; count = how many are flagged. One block.
__global__ void __launch_bounds__(BLOCK) compact_rows(const uint8_t* flag, int64_t* rows, int64_t* count, int64_t n) {
    int* totals = reinterpret_cast<int*>(shared_memory());
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t stretch = (n + BLOCK - 1) / BLOCK * 32;
    int64_t begin = min(n, warp * stretch), end = min(n, begin + stretch);
    int mine = 0;
    for (int64_t i = begin + lane; i - lane < end; i += 32) mine += __popc(__ballot_sync(0xffffffffu, i < end && flag[i]));
    if (lane == 0) totals[warp] = mine;
    __syncthreads();
    int sum = totals[lane];  // inclusive over warps, in every warp
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    int64_t all = __shfl_sync(0xffffffffu, sum, 31);
    int64_t before = __shfl_sync(0xffffffffu, sum, warp) - mine;
    for (int64_t i = begin + lane; i - lane < end; i += 32) {
        uint32_t active = __ballot_sync(0xffffffffu, i < end && flag[i]);
        int64_t at = before + __popc(active & ((1u << lane) - 1));
        if (i < end) rows[active >> lane & 1 ? at : all + i - at] = i;
        before += __popc(active);
    }
    if (threadIdx.x == 0) *count = all;
}

extern "C" int parlance_compact_rows(const uint8_t* flag, int64_t* rows, int64_t* count, int64_t n, void* stream) {
    return launch(compact_rows, 1, BLOCK, 32 * sizeof(int), stream, flag, rows, count, n);
}

// to[i] = from[rows[i]] for i < count, zeros behind; or, the other way, to[rows[i]] = from[i] for i < count.
template <class Unit, bool SCATTER>
__global__ void __launch_bounds__(THREADS)
    move_rows(const Unit* from, const int64_t* rows, const int64_t* count, Unit* to, int64_t n, int64_t width) {
    int64_t i = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
    bool active = i < n && i < *count;
    if (i >= n || (SCATTER && !active)) return;
    int64_t row = rows[i];
    for (int64_t c = threadIdx.x % 32; c < width; c += 32) {
        if (SCATTER)
            to[row * width + c] = from[i * width + c];
        else
            to[i * width + c] = active ? from[row * width + c] : Unit{};
    }
}

template <bool SCATTER>
static int move(const void* from, const int64_t* rows, const int64_t* count, void* to, int64_t n, int64_t row_bytes,
                void* stream) {
    uint64_t unit = unit_of(row_bytes | address(from) | address(to));
    auto start = [&](auto sample) {
        using Unit = decltype(sample);
        return launch(move_rows<Unit, SCATTER>, a_warp_each(n), THREADS, 0, stream, static_cast<const Unit*>(from), rows,
                      count, static_cast<Unit*>(to), n, row_bytes / static_cast<int64_t>(sizeof(Unit)));
    };
    return unit == 16 ? start(uint4{}) : unit >= 4 ? start(uint32_t{}) : start(uint16_t{});
}

extern "C" int parlance_gather_rows(const void* from, const int64_t* rows, const int64_t* count, void* to, int64_t n,
                                    int64_t row_bytes, void* stream) {
    return move<false>(from, rows, count, to, n, row_bytes, stream);
}

extern "C" int parlance_scatter_rows(const void* from, const int64_t* rows, const int64_t* count, void* to, int64_t n,
                                     int64_t row_bytes, void* stream) {
    return move<true>(from, rows, count, to, n, row_bytes, stream);
}

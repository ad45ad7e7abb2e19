// Attention of packed rows under a SampleMask, forward (parlance_kernels/sample_attention).
//
// Ladder (times: not measured, no GPU has run it yet)
//   1  64 x 64 tiles, a warp 16 rows; online softmax in base 2; tiles that nobody reads are never loaded, tiles that all read
//      are not masked. Row tiles with the most keys start first.
//   2  K and V in two stages by cp.async: a tile travels while the one before is computed, one barrier a tile.
//   3  In a tile that is read in part each warp skips the 16 x 16 parts that its strip does not read.
//   4  The result goes through the warp's own strip of Q's tile, so that rows leave in 16 bytes a lane.
//   5  Short samples: keys are loaded once for up to 16 strips of rows, of any segment; no barrier behind that.

#include "attention_rows.h"

template <class T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2)
    attention_forward(Attention a, const RowTile* work, const T* q, const T* k, const T* v, T* o, float* lse) {
    int head = blockIdx.x % a.heads, strip = threadIdx.x / 32 * STRIP;
    RowTile w = work[blockIdx.x / a.heads];
    const Segment s = a.segments[w.segment];
    int end = min(w.row + TILE, s.rows), row = w.row + strip, row_end = min(row + STRIP, end);
    T* q_tile = reinterpret_cast<T*>(shared_memory());
    Strip<T, D, D <= 64> q_strip;
    StripResult<T, D> result;
    walk_tiles<T, D>(
        a, s, head, w.row, end, k, v, q_tile + AREA<D>,
        [&] {
            auto exists = [&](int at) { return w.row + at < end; };
            fetch_rows<T, D>(q_tile, q + head * D, int64_t{a.heads} * D, s.row_start + w.row, exists);
        },
        [&] { q_strip.load(q_tile + strip * PITCH<D>); },
        [&](int key, const T* k_tile, const T* v_tile) {
            if (row < end) result.read(a, s, head, row, row_end, key, q_strip, k_tile, v_tile);
        });
    if (row < end) result.store(a, s, head, row, row_end, q_tile + strip * PITCH<D>, o, lse);
}

// room: keys that shared memory has place for, a multiple of 16.
template <class T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2)
    attention_forward_short(Attention a, const KeyTile* work, const RowTile* strips, const T* q, const T* k, const T* v, T* o,
                            float* lse, int room) {
    int head = blockIdx.x % a.heads;
    T* k_rows = reinterpret_cast<T*>(shared_memory());
    T* v_rows = k_rows + room * PITCH<D>;
    T* q_rows = v_rows + room * PITCH<D> + threadIdx.x / 32 * STRIP * PITCH<D>;
    walk_strips<T, D>(
        a, work[blockIdx.x / a.heads], strips, head, k, v, k_rows, v_rows,
        [&](const Segment& s, int row, int row_end) {
            fetch_strip<T, D>(q_rows, q + head * D, int64_t{a.heads} * D, s.row_start + row, row_end - row);
        },
        [&](const Segment& s, int row, int row_end) {
            Strip<T, D, D <= 64> q_strip;
            q_strip.load(q_rows);
            StripResult<T, D> result;
            KeyTiles tiles = key_tiles(s, row, row_end, TILE);
            for (int i = 0; i < tiles.count; ++i) {
                int key = tiles.at(i), from = key * PITCH<D>;
                result.read(a, s, head, row, row_end, key, q_strip, k_rows + from, v_rows + from);
            }
            result.store(a, s, head, row, row_end, q_rows, o, lse);
        });
}

// work: `n_work` row tiles; short_work: `n_short` samples and their strips, none for heads wider than 64. Addresses of q, k, v and o are multiples of
// 16. lse: [heads, rows].
extern "C" int parlance_attention_forward(const int* segments, const int* work, const int* short_work, const int* strips,
                                          const void* q, const void* k, const void* v, void* o, float* lse,
                                          const int64_t* seed, int64_t n_work, int64_t n_short, int64_t room, int64_t rows,
                                          int64_t heads, int64_t width, int64_t drop_below, int64_t dtype, double scale,
                                          void* stream) {
    Attention a = attention_of(segments, seed, rows, heads, drop_below, scale);
    return for_each_kind(dtype, width, [&](auto sample, auto constant) {
        using T = decltype(sample);
        constexpr int D = decltype(constant)::value;
        auto in = [](const void* x) { return static_cast<const T*>(x); };
        dim3 grid(static_cast<unsigned>(n_work * heads));
        int error = launch(attention_forward<T, D>, grid, THREADS, 5 * AREA<D> * sizeof(T), stream, a,
                           reinterpret_cast<const RowTile*>(work), in(q), in(k), in(v), static_cast<T*>(o), lse);
        if (error || !n_short) return error;
        if constexpr (D <= 64) {
            grid = dim3(static_cast<unsigned>(n_short * heads));
            return launch(attention_forward_short<T, D>, grid, THREADS, (2 * room + TILE) * PITCH<D> * sizeof(T), stream, a,
                          reinterpret_cast<const KeyTile*>(short_work), reinterpret_cast<const RowTile*>(strips), in(q), in(k),
                          in(v), static_cast<T*>(o), lse, room);
        }
        return INVALID_VALUE;
    });
}

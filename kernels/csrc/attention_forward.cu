// Attention of packed rows under a SampleMask, forward (parlance_kernels/sample_attention).
//
// Ladder (times: not measured, no GPU has run it yet)
//   1  64 x 64 tiles, a warp 16 rows; online softmax in base 2; tiles that nobody reads are never loaded, tiles that all read
//      are not masked. Row tiles with the most keys start first.
//   2  K and V in two stages by cp.async: a tile travels while the one before is computed, one barrier a tile.
//   3  In a tile that is read in part each warp skips the 16 x 16 parts that its strip does not read.
//   4  The result goes through the warp's own strip of Q's tile, so that rows leave in 16 bytes a lane.

#include "attention.h"

template <class T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2)
    attention_forward(Attention a, const RowTile* work, const T* q, const T* k, const T* v, T* o, float* lse) {
    int head = blockIdx.x % a.heads, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    RowTile w = work[blockIdx.x / a.heads];
    const Segment s = a.segments[w.segment];
    int rows = min(TILE, s.rows - w.row), strip = warp * STRIP;
    int row = w.row + strip, row_end = w.row + min(rows, strip + STRIP);
    int64_t stride = int64_t{a.heads} * D;
    T* q_tile = reinterpret_cast<T*>(shared_memory());
    T* stages = q_tile + AREA<D>;  // K, V; K, V
    RowKeys all = hull(s, w.row, w.row + rows);
    KeyTiles tiles = key_tiles(s, w.row, w.row + rows, TILE);
    auto fetch = [&](int i) {
        T* to = stages + i % 2 * 2 * AREA<D>;
        int from = tiles.at(i);
        auto is_read = [&](int at) { return reads(all, from + at); };
        fetch_rows<T, D>(to, k + head * D, stride, s.key_start + from, is_read);
        fetch_rows<T, D>(to + AREA<D>, v + head * D, stride, s.key_start + from, is_read);
        cp_async_commit();
    };
    fetch_rows<T, D>(q_tile, q + head * D, stride, s.row_start + w.row, [&](int at) { return at < rows; });
    cp_async_commit();
    if (tiles.count) fetch(0);
    cp_async_wait<0>();
    __syncthreads();
    Strip<T, D, D <= 64> q_strip;
    q_strip.load(q_tile + strip * PITCH<D>);

    float sum[D / 8][4] = {}, most = -INFINITY, most_8 = -INFINITY, total = 0, total_8 = 0;
    float to_base_2 = a.scale * LOG2_E;
    for (int i = 0; i < tiles.count; ++i) {
        if (i) cp_async_wait<0>(), __syncthreads();
        if (i + 1 < tiles.count) fetch(i + 1);
        int key = tiles.at(i);
        if (strip >= rows) continue;
        TileClass kind = classify(s, row, row_end, key, key + TILE);
        if (kind == TILE_EMPTY) continue;
        uint32_t live = kind == TILE_FULL ? 15 : live_key_groups(s, row, row_end, key, 4);
        const T* k_tile = stages + i % 2 * 2 * AREA<D>;
        float x[8][4] = {};
        add_scores<T, D, 4>(x, q_strip, lane_of_columns<D>(k_tile), live);
        if (kind == TILE_PARTIAL) {
            RowKeys mine = row_keys(s, row + g), mine_8 = row_keys(s, row + g + 8);
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    int at = key + 8 * j + 2 * t + e;
                    if (!reads(mine, at)) x[j][e] = -INFINITY;
                    if (!reads(mine_8, at)) x[j][2 + e] = -INFINITY;
                }
        }
        float top = most, top_8 = most_8;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            top = fmaxf(top, fmaxf(x[j][0], x[j][1]));
            top_8 = fmaxf(top_8, fmaxf(x[j][2], x[j][3]));
        }
        top = quad_max(top), top_8 = quad_max(top_8);
        float base = top == -INFINITY ? 0 : top * to_base_2, base_8 = top_8 == -INFINITY ? 0 : top_8 * to_base_2;
        float shrink = fast_exp2(most * to_base_2 - base), shrink_8 = fast_exp2(most_8 * to_base_2 - base_8);
        most = top, most_8 = top_8;
        total *= shrink, total_8 *= shrink_8;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                x[j][e] = fast_exp2(x[j][e] * to_base_2 - base);
                x[j][2 + e] = fast_exp2(x[j][2 + e] * to_base_2 - base_8);
                total += x[j][e], total_8 += x[j][2 + e];
            }
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            sum[j][0] *= shrink, sum[j][1] *= shrink;
            sum[j][2] *= shrink_8, sum[j][3] *= shrink_8;
        }
        if (a.drop_below) drop<4>(x, a, s, head, row + g, key + 2 * t);
        add_weighted<T, D, 4>(sum, x, lane_of_rows<D>(k_tile + AREA<D>), live);
    }

    if (strip >= rows) return;
    total = quad_sum(total), total_8 = quad_sum(total_8);
    if (t == 0) {
        float* to = lse + head * a.rows + s.row_start + row;
        if (row + g < row_end) to[g] = total == 0 ? -INFINITY : most * a.scale + logf(total);
        if (row + g + 8 < row_end) to[g + 8] = total_8 == 0 ? -INFINITY : most_8 * a.scale + logf(total_8);
    }
    float factor = total == 0 ? 0 : a.keep_factor / total, factor_8 = total_8 == 0 ? 0 : a.keep_factor / total_8;
    T* to = o + (s.row_start + row) * stride + head * D;
    store_strip<T, D>(q_tile + strip * PITCH<D>, sum, factor, factor_8, to, stride, row_end - row);
}

// work: `n_work` row tiles. Addresses of q, k, v and o are multiples of 16. lse: [heads, rows].
extern "C" int parlance_attention_forward(const int* segments, const int* work, const void* q, const void* k, const void* v,
                                          void* o, float* lse, const int64_t* seed, int64_t n_work, int64_t rows,
                                          int64_t heads, int64_t width, int64_t drop_below, int64_t dtype, double scale,
                                          void* stream) {
    Attention a = attention_of(segments, seed, rows, heads, drop_below, scale);
    return for_each_kind(dtype, width, [&](auto sample, auto constant) {
        using T = decltype(sample);
        constexpr int D = decltype(constant)::value;
        return launch(attention_forward<T, D>, dim3(static_cast<unsigned>(n_work * heads)), THREADS, 5 * AREA<D> * sizeof(T),
                      stream, a, reinterpret_cast<const RowTile*>(work), static_cast<const T*>(q), static_cast<const T*>(k),
                      static_cast<const T*>(v), static_cast<T*>(o), lse);
    });
}

// A warp's strip of 16 rows and the 64 keys of a tile: what the forward and dQ do with them, in the long shape and the
// short one.
//
// `row` and `row_end` bound the strip in its segment, `key` is the tile's first key there; `k_tile` and `v_tile` lie in
// shared memory. All lanes of a warp call with the same numbers.

#pragma once
#include "attention.h"

// The result of a strip: online softmax in base 2.
template <class T, int D>
struct StripResult {
    float sum[D / 8][4] = {}, most = -INFINITY, most_8 = -INFINITY, total = 0, total_8 = 0;

    __device__ __forceinline__ void read(const Attention& a, const Segment& s, int head, int row, int row_end, int key,
                                         const Strip<T, D, D <= 64>& q_strip, const T* k_tile, const T* v_tile) {
        TileClass kind = classify(s, row, row_end, key, key + TILE);
        if (kind == TILE_EMPTY) return;
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float to_base_2 = a.scale * LOG2_E;
        uint32_t live = kind == TILE_FULL ? 15 : live_key_groups(s, row, row_end, key, 4);
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
        add_weighted<T, D, 4>(sum, x, lane_of_rows<D>(v_tile), live);
    }

    // Writes o and lse; `strip` in shared memory is the warp's own and may be overwritten.
    __device__ __forceinline__ void store(const Attention& a, const Segment& s, int head, int row, int row_end, T* strip,
                                          T* o, float* lse) {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        int64_t stride = int64_t{a.heads} * D;
        total = quad_sum(total), total_8 = quad_sum(total_8);
        if (t == 0) {
            float* to = lse + head * a.rows + s.row_start + row;
            if (row + g < row_end) to[g] = total == 0 ? -INFINITY : most * a.scale + logf(total);
            if (row + g + 8 < row_end) to[g + 8] = total_8 == 0 ? -INFINITY : most_8 * a.scale + logf(total_8);
        }
        float factor = total == 0 ? 0 : a.keep_factor / total, factor_8 = total_8 == 0 ? 0 : a.keep_factor / total_8;
        store_strip<T, D>(strip, sum, factor, factor_8, o + (s.row_start + row) * stride + head * D, stride, row_end - row);
    }
};

// dQ of a strip, 32 keys at a time; and delta of its rows.
template <class T, int D>
struct StripGradient {
    static constexpr int PASS = 32, GROUPS = PASS / 16;
    Strip<T, D, D <= 64> q_strip, d_o_strip;
    float sum[D / 8][4] = {}, owed, owed_8, base, base_8;

    // q_rows, d_o_rows: the strip's in shared memory.
    __device__ __forceinline__ void load(const Attention& a, const Segment& s, int head, int row, int row_end, const T* q_rows,
                                         const T* d_o_rows, const T* o, const float* lse, float* delta) {
        int lane = threadIdx.x % 32, g = lane / 4;
        int64_t stride = int64_t{a.heads} * D, stat = head * a.rows + s.row_start + row;
        float both = 0;  // two lanes a row, each half of it
        if (int r = lane / 2; row + r < row_end) {
            const T* left = o + (s.row_start + row + r) * stride + head * D + lane % 2 * (D / 2);
            const T* right = d_o_rows + r * PITCH<D> + lane % 2 * (D / 2);
#pragma unroll
            for (int at = 0; at < D / 2; at += 8) {
                Vector16<T> x = load_16(left + at), y = load_16(right + at);
#pragma unroll
                for (int i = 0; i < 8; ++i) both += to_float(x.at[i]) * to_float(y.at[i]);
            }
        }
        both += __shfl_xor_sync(0xffffffffu, both, 1);
        if (lane % 2 == 0 && row + lane / 2 < row_end) delta[stat + lane / 2] = both;
        owed = __shfl_sync(0xffffffffu, both, 2 * g), owed_8 = __shfl_sync(0xffffffffu, both, 2 * g + 16);
        // Rows that are none have weight 0.
        base = row + g < row_end ? lse[stat + g] * LOG2_E : INFINITY;
        base_8 = row + g + 8 < row_end ? lse[stat + g + 8] * LOG2_E : INFINITY;
        q_strip.load(q_rows), d_o_strip.load(d_o_rows);
    }

    __device__ __forceinline__ void read(const Attention& a, const Segment& s, int head, int row, int row_end, int tile_key,
                                         const T* k_tile, const T* v_tile) {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float to_base_2 = a.scale * LOG2_E;
#pragma unroll
        for (int pass = 0; pass < TILE / PASS; ++pass) {
            int key = tile_key + pass * PASS;
            TileClass kind = classify(s, row, row_end, key, key + PASS);
            if (kind == TILE_EMPTY) continue;
            uint32_t live = kind == TILE_FULL ? (1u << GROUPS) - 1 : live_key_groups(s, row, row_end, key, GROUPS);
            const T* k_rows = k_tile + pass * PASS * PITCH<D>;
            const T* v_rows = v_tile + pass * PASS * PITCH<D>;
            float x[2 * GROUPS][4] = {}, y[2 * GROUPS][4] = {};
            add_scores<T, D, GROUPS>(x, q_strip, lane_of_columns<D>(k_rows), live);
            add_scores<T, D, GROUPS>(y, d_o_strip, lane_of_columns<D>(v_rows), live);
            if (a.drop_below) drop<GROUPS>(y, a, s, head, row + g, key + 2 * t);
#pragma unroll
            for (int j = 0; j < 2 * GROUPS; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    x[j][e] = fast_exp2(x[j][e] * to_base_2 - base) * (y[j][e] * a.keep_factor - owed);
                    x[j][2 + e] = fast_exp2(x[j][2 + e] * to_base_2 - base_8) * (y[j][2 + e] * a.keep_factor - owed_8);
                }
            if (kind == TILE_PARTIAL) {
                RowKeys mine = row_keys(s, row + g), mine_8 = row_keys(s, row + g + 8);
#pragma unroll
                for (int j = 0; j < 2 * GROUPS; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        int at = key + 8 * j + 2 * t + e;
                        if (!reads(mine, at)) x[j][e] = 0;
                        if (!reads(mine_8, at)) x[j][2 + e] = 0;
                    }
            }
            add_weighted<T, D, GROUPS>(sum, x, lane_of_rows<D>(k_rows), live);
        }
    }

    __device__ __forceinline__ void store(const Attention& a, const Segment& s, int head, int row, int row_end, T* strip,
                                          T* d_q) const {
        int64_t stride = int64_t{a.heads} * D;
        T* to = d_q + (s.row_start + row) * stride + head * D;
        store_strip<T, D>(strip, sum, a.scale, a.scale, to, stride, row_end - row);
    }
};

// ---- the two shapes

// Long: 64 rows of a segment, and the tiles of keys that they read pass through two stages of shared memory.
//   fetch_own(): asks for the rows themselves.  begin(): they are there.  read(key, k_tile, v_tile): a tile is there.
template <class T, int D, class FetchOwn, class Begin, class Read>
__device__ __forceinline__ void walk_tiles(const Attention& a, const Segment& s, int head, int row, int row_end, const T* k,
                                           const T* v, T* stages, FetchOwn fetch_own, Begin begin, Read read) {
    int64_t stride = int64_t{a.heads} * D;
    RowKeys all = hull(s, row, row_end);
    KeyTiles tiles = key_tiles(s, row, row_end, TILE);
    auto fetch = [&](int i) {
        T* to = stages + i % 2 * 2 * AREA<D>;
        int from = tiles.at(i);
        auto is_read = [&](int at) { return reads(all, from + at); };
        fetch_rows<T, D>(to, k + head * D, stride, s.key_start + from, is_read);
        fetch_rows<T, D>(to + AREA<D>, v + head * D, stride, s.key_start + from, is_read);
        cp_async_commit();
    };
    fetch_own();
    cp_async_commit();
    if (tiles.count) fetch(0);
    cp_async_wait<0>();
    __syncthreads();
    begin();
    for (int i = 0; i < tiles.count; ++i) {
        if (i) cp_async_wait<0>(), __syncthreads();
        if (i + 1 < tiles.count) fetch(i + 1);
        const T* k_tile = stages + i % 2 * 2 * AREA<D>;
        read(tiles.at(i), k_tile, k_tile + AREA<D>);
    }
}

// Short: all keys of a sample stay in `k_rows` and `v_rows`; each warp takes strips of rows and waits for no other.
//   fetch(s, row, row_end): asks for the strip itself.  work(s, row, row_end): it is there.
template <class T, int D, class Fetch, class Work>
__device__ __forceinline__ void walk_strips(const Attention& a, const KeyTile& w, const RowTile* strips, int head, const T* k,
                                            const T* v, T* k_rows, T* v_rows, Fetch fetch, Work work) {
    constexpr int CHUNKS = D / 8;
    int64_t stride = int64_t{a.heads} * D;
    for (int chunk = threadIdx.x; chunk < (w.keys + 15) / 16 * 16 * CHUNKS; chunk += THREADS) {
        int key = chunk / CHUNKS, column = chunk % CHUNKS * 8, to = key * PITCH<D> + column;
        int64_t from = head * D + (key < w.keys ? (w.key + key) * stride + column : 0);
        cp_async_16(k_rows + to, k + from, key < w.keys);
        cp_async_16(v_rows + to, v + from, key < w.keys);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int at = w.first + static_cast<int>(threadIdx.x) / 32; at < w.last; at += THREADS / 32) {
        const Segment s = a.segments[strips[at].segment];
        int row = strips[at].row, row_end = min(row + STRIP, s.rows);
        __syncwarp();  // the strip before has been read
        fetch(s, row, row_end);
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        work(s, row, row_end);
    }
}

// A warp's strip of rows for its own 32 lanes; rows that do not exist become zeros. Not committed.
template <class T, int D>
__device__ __forceinline__ void fetch_strip(T* strip, const T* head, int64_t stride, int64_t row, int rows) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < STRIP * CHUNKS / 32; ++i) {
        int chunk = threadIdx.x % 32 + i * 32, at = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        cp_async_16(strip + at * PITCH<D> + column, at < rows ? head + (row + at) * stride + column : head, at < rows);
    }
}

// Attention of packed rows under a SampleMask, backward: one kernel for dQ, one for dK and dV. No atomics: each sum has one
// order, so a gradient is the same bit for bit every time, whatever else is in the batch.
//
// With P = exp(scale q k^T - lse), its weights after dropout W and delta = sum_d dO O:
//     dV = W^T dO      dS = P (dropout(dO V^T) - delta)      dQ = scale dS K      dK = scale dS^T Q
//
// Ladder (times: not measured, no GPU has run it yet)
//   1  Scores and their gradients are made twice, once for each kernel: 7 products instead of 5, and no atomics.
//   2  dK and dV from transposed scores (a warp has 16 keys): accumulators are the next operand as they stand.
//   3  32 columns at a time, so that scores and gradients of a whole tile never wait in registers together.
//   4  delta comes from dQ's kernel, which has dO in shared memory; no launch of its own.
//   5  Parts of 16 x 16 that are not read are skipped as in the forward.
//   6  K's strip is read again for each product where two sums of 64 columns wait in registers: nothing spills.
//   7  Short samples: dQ from resident keys, as in the forward; dK and dV as before, from a list of the rows that read them.

#include "attention_rows.h"

constexpr int PASS = 32, GROUPS = PASS / 16;

// dQ of a row tile, and delta of its rows.
template <class T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2)
    attention_d_q(Attention a, const RowTile* work, const T* q, const T* k, const T* v, const T* o, const float* lse,
                  const T* d_o, float* delta, T* d_q) {
    int head = blockIdx.x % a.heads, strip = threadIdx.x / 32 * STRIP;
    RowTile w = work[blockIdx.x / a.heads];
    const Segment s = a.segments[w.segment];
    int end = min(w.row + TILE, s.rows), row = w.row + strip, row_end = min(row + STRIP, end);
    T* q_tile = reinterpret_cast<T*>(shared_memory());
    T* d_o_tile = q_tile + AREA<D>;
    StripGradient<T, D> gradient;
    walk_tiles<T, D>(
        a, s, head, w.row, end, k, v, d_o_tile + AREA<D>,
        [&] {
            auto exists = [&](int at) { return w.row + at < end; };
            int64_t stride = int64_t{a.heads} * D, first = s.row_start + w.row;
            fetch_rows<T, D>(q_tile, q + head * D, stride, first, exists);
            fetch_rows<T, D>(d_o_tile, d_o + head * D, stride, first, exists);
        },
        [&] {
            const T* d_o_rows = d_o_tile + strip * PITCH<D>;
            gradient.load(a, s, head, row, row_end, q_tile + strip * PITCH<D>, d_o_rows, o, lse, delta);
        },
        [&](int key, const T* k_tile, const T* v_tile) {
            if (row < end) gradient.read(a, s, head, row, row_end, key, k_tile, v_tile);
        });
    if (row < end) gradient.store(a, s, head, row, row_end, q_tile + strip * PITCH<D>, d_q);
}

// The same for short samples.
template <class T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2)
    attention_d_q_short(Attention a, const KeyTile* work, const RowTile* strips, const T* q, const T* k, const T* v,
                        const T* o, const float* lse, const T* d_o, float* delta, T* d_q, int room) {
    int head = blockIdx.x % a.heads;
    T* k_rows = reinterpret_cast<T*>(shared_memory());
    T* v_rows = k_rows + room * PITCH<D>;
    T* q_rows = v_rows + room * PITCH<D> + threadIdx.x / 32 * 2 * STRIP * PITCH<D>;
    T* d_o_rows = q_rows + STRIP * PITCH<D>;
    walk_strips<T, D>(
        a, work[blockIdx.x / a.heads], strips, head, k, v, k_rows, v_rows,
        [&](const Segment& s, int row, int row_end) {
            int64_t stride = int64_t{a.heads} * D, first = s.row_start + row;
            fetch_strip<T, D>(q_rows, q + head * D, stride, first, row_end - row);
            fetch_strip<T, D>(d_o_rows, d_o + head * D, stride, first, row_end - row);
        },
        [&](const Segment& s, int row, int row_end) {
            StripGradient<T, D> gradient;
            gradient.load(a, s, head, row, row_end, q_rows, d_o_rows, o, lse, delta);
            KeyTiles tiles = key_tiles(s, row, row_end, TILE);
            for (int i = 0; i < tiles.count; ++i) {
                int key = tiles.at(i), from = key * PITCH<D>;
                gradient.read(a, s, head, row, row_end, key, k_rows + from, v_rows + from);
            }
            gradient.store(a, s, head, row, row_end, q_rows, d_q);
        });
}

// Bit 4 j + i: x[j][i] of a strip of keys by 32 rows is dropped; `row` and `key` are those of the lane's x[0][0].
__device__ __forceinline__ uint32_t dropped_of(const Attention& a, const Segment& s, int head, int row, int key) {
    uint32_t dropped = 0;
    int word = key / 8 % 4, word_8 = (word + 1) % 4;
#pragma unroll
    for (int n = 0; n < GROUPS; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            uint4 bits = draw(a, s, head, row + 16 * n + e, key & ~24), bits_8 = bits;
            // Where another sample's first key has cut the tile, key + 8 may be of another draw.
            if (word == 3) bits_8 = draw(a, s, head, row + 16 * n + e, (key + 8) & ~24);
            uint32_t two[2] = {word_of(bits, word), word_of(bits_8, word_8)};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t at = 8 * n + 2 * i + e;
                dropped |= uint32_t{static_cast<int>(two[i] & 0xffff) < a.drop_below} << at;
                dropped |= uint32_t{static_cast<int>(two[i] >> 16) < a.drop_below} << (at + 4);
            }
        }
    return dropped;
}

// dK and dV of a key tile, from every row that reads any of it.
template <class T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2)
    attention_d_kv(Attention a, const KeyTile* work, const int* readers, const T* q, const T* k, const T* v,
                   const float* lse, const T* d_o, const float* delta, T* d_k, T* d_v) {
    int head = blockIdx.x % a.heads, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const KeyTile w = work[blockIdx.x / a.heads];
    int strip = threadIdx.x / 32 * STRIP;
    int64_t stride = int64_t{a.heads} * D;
    T* k_tile = reinterpret_cast<T*>(shared_memory());
    T* v_tile = k_tile + AREA<D>;
    T* stages = v_tile + AREA<D>;                                      // Q, dO; Q, dO
    float* stats = reinterpret_cast<float*>(stages + 4 * AREA<D>);     // lse in base 2, delta; the same
    int at = w.first, row = 0;                                         // the next row tile, of segment readers[at]
    auto find = [&] {                                                  // ... that reads any of the keys
        for (; at < w.last; ++at, row = 0) {
            const Segment& s = a.segments[readers[at]];
            int key = w.key - s.key_start;
            for (; row < s.rows; row += TILE)
                if (classify(s, row, min(row + TILE, s.rows), key, key + w.keys) != TILE_EMPTY) return;
        }
    };
    auto fetch = [&](int stage) {  // and this thread's number of the stats
        const Segment& s = a.segments[readers[at]];
        int first = s.row_start + row, rows = s.rows - row;
        auto exists = [&](int i) { return i < rows; };
        T* to = stages + stage * 2 * AREA<D>;
        fetch_rows<T, D>(to, q + head * D, stride, first, exists);
        fetch_rows<T, D>(to + AREA<D>, d_o + head * D, stride, first, exists);
        cp_async_commit();
        int i = threadIdx.x % TILE;
        int64_t from = head * a.rows + first + i;
        if (threadIdx.x < TILE) return exists(i) ? lse[from] * LOG2_E : INFINITY;
        return exists(i) ? delta[from] : 0.0f;
    };
    auto is_mine = [&](int i) { return i < w.keys; };
    fetch_rows<T, D>(k_tile, k + head * D, stride, w.key, is_mine);
    fetch_rows<T, D>(v_tile, v + head * D, stride, w.key, is_mine);
    cp_async_commit();
    find();
    if (at < w.last) stats[threadIdx.x] = fetch(0);
    cp_async_wait<0>();
    __syncthreads();
    Strip<T, D, D <= 32> k_strip;  // with two sums there are registers for one of them
    Strip<T, D, D <= 64> v_strip;
    k_strip.load(k_tile + strip * PITCH<D>);
    v_strip.load(v_tile + strip * PITCH<D>);

    float sum_k[D / 8][4] = {}, sum_v[D / 8][4] = {};
    float to_base_2 = a.scale * LOG2_E;
    for (int stage = 0; at < w.last; stage ^= 1) {
        const Segment& s = a.segments[readers[at]];
        int row_tile = row;
        row += TILE;
        find();
        float next = 0;
        bool more = at < w.last;
        if (more) next = fetch(stage ^ 1);
        int key = w.key - s.key_start + strip, key_end = w.key - s.key_start + min(w.keys, strip + STRIP);
        const T* q_tile = stages + stage * 2 * AREA<D>;
        const float* stat = stats + stage * 2 * TILE;
#pragma unroll 1
        for (int pass = 0; pass < TILE / PASS && strip < w.keys; ++pass) {
            int first = row_tile + pass * PASS;
            if (first >= s.rows) break;
            TileClass kind = classify(s, first, min(first + PASS, s.rows), key, key_end);
            if (kind == TILE_EMPTY) continue;
            uint32_t live = kind == TILE_FULL ? (1u << GROUPS) - 1 : live_row_groups(s, first, key, key_end, GROUPS);
            const T* q_rows = q_tile + pass * PASS * PITCH<D>;
            float x[2 * GROUPS][4] = {};
            add_scores<T, D, GROUPS>(x, k_strip, lane_of_columns<D>(q_rows), live);
#pragma unroll
            for (int j = 0; j < 2 * GROUPS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    x[j][e] = fast_exp2(x[j][e] * to_base_2 - stat[pass * PASS + 8 * j + 2 * t + e % 2]);
            if (kind == TILE_PARTIAL) {
#pragma unroll
                for (int j = 0; j < 2 * GROUPS; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        int r = first + 8 * j + 2 * t + e;
                        RowKeys its = row_keys(s, r);
                        if (r >= s.rows || !reads(its, key + g)) x[j][e] = 0;
                        if (r >= s.rows || !reads(its, key + g + 8)) x[j][2 + e] = 0;
                    }
            }
            uint32_t dropped = a.drop_below ? dropped_of(a, s, head, first + 2 * t, key + g) : 0;
            float w[2 * GROUPS][4];
#pragma unroll
            for (int j = 0; j < 2 * GROUPS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) w[j][e] = dropped >> (4 * j + e) & 1 ? 0 : x[j][e];
            add_weighted<T, D, GROUPS>(sum_v, w, lane_of_rows<D>(q_rows + AREA<D>), live);
            float y[2 * GROUPS][4] = {};
            add_scores<T, D, GROUPS>(y, v_strip, lane_of_columns<D>(q_rows + AREA<D>), live);
#pragma unroll
            for (int j = 0; j < 2 * GROUPS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float gradient = dropped >> (4 * j + e) & 1 ? 0 : y[j][e] * a.keep_factor;
                    gradient -= stat[TILE + pass * PASS + 8 * j + 2 * t + e % 2];
                    x[j][e] = x[j][e] == 0 ? 0 : x[j][e] * gradient;  // a hidden row may hold anything
                }
            add_weighted<T, D, GROUPS>(sum_k, x, lane_of_rows<D>(q_rows), live);
        }
        if (more) stats[(stage ^ 1) * 2 * TILE + threadIdx.x] = next;
        cp_async_wait<0>();
        __syncthreads();
    }

    if (strip >= w.keys) return;
    int64_t to = (w.key + strip) * stride + head * D;
    int keys = min(STRIP, w.keys - strip);
    store_strip<T, D>(k_tile + strip * PITCH<D>, sum_k, a.scale, a.scale, d_k + to, stride, keys);
    store_strip<T, D>(v_tile + strip * PITCH<D>, sum_v, a.keep_factor, a.keep_factor, d_v + to, stride, keys);
}

// Row tiles and short samples as in the forward; key tiles cover all keys. delta: [heads, rows], made on the way.
extern "C" int parlance_attention_backward(const int* segments, const int* work, const int* short_work, const int* strips,
                                           const int* key_work, const int* readers, const void* q, const void* k,
                                           const void* v, const void* o, const float* lse, const void* d_o, float* delta,
                                           void* d_q, void* d_k, void* d_v, const int64_t* seed, int64_t n_work,
                                           int64_t n_short, int64_t room, int64_t n_key_work, int64_t rows, int64_t heads,
                                           int64_t width, int64_t drop_below, int64_t dtype, double scale, void* stream) {
    Attention a = attention_of(segments, seed, rows, heads, drop_below, scale);
    return for_each_kind(dtype, width, [&](auto sample, auto constant) {
        using T = decltype(sample);
        constexpr int D = decltype(constant)::value;
        auto in = [](const void* x) { return static_cast<const T*>(x); };
        auto out = [](void* x) { return static_cast<T*>(x); };
        auto blocks = [&](int64_t n) { return dim3(static_cast<unsigned>(n * heads)); };
        size_t bytes = 6 * AREA<D> * sizeof(T);
        int error = launch(attention_d_q<T, D>, blocks(n_work), THREADS, bytes, stream, a,
                           reinterpret_cast<const RowTile*>(work), in(q), in(k), in(v), in(o), lse, in(d_o), delta, out(d_q));
        if (error || (n_short && D > 64)) return error ? error : INVALID_VALUE;
        if constexpr (D <= 64) {
            error = launch(attention_d_q_short<T, D>, blocks(n_short), THREADS, (2 * room + 2 * TILE) * PITCH<D> * sizeof(T),
                           stream, a, reinterpret_cast<const KeyTile*>(short_work),
                           reinterpret_cast<const RowTile*>(strips), in(q), in(k), in(v), in(o), lse, in(d_o), delta,
                           out(d_q), room);
            if (error) return error;
        }
        return launch(attention_d_kv<T, D>, blocks(n_key_work), THREADS, bytes + 4 * TILE * sizeof(float), stream, a,
                      reinterpret_cast<const KeyTile*>(key_work), readers, in(q), in(k), in(v), lse, in(d_o), delta, out(d_k),
                      out(d_v));
    });
}

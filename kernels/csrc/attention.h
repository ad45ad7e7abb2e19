// What the attention kernels share: strips of 16 rows in tensor-core fragments, tiles in shared memory, dropout.
//
// A block has four warps and takes 64 x 64 pairs at a time; a warp takes a strip of 16 of its rows (forward, dQ) or of its
// keys (dK, dV). Accumulators of one product are the operand of the next: weights never go through shared memory.
//
// Lane l of a warp has g = l / 4 and t = l % 4. An accumulator x[j][i] of a strip is row g + 8 (i / 2), column
// 8 j + 2 t + i % 2.

#pragma once
#include <type_traits>

#include "philox.h"

constexpr int TILE = 64, STRIP = 16, THREADS = TILE / STRIP * 32;

// Rows of a tile lie 16 bytes further apart than they are long: the eight rows that ldmatrix reads together then lie in
// different banks, for every width that is a multiple of 32.
template <int D>
constexpr int PITCH = D + 8;
template <int D>
constexpr int AREA = TILE * PITCH<D>;

// Rows of q from `row` of a segment, at most 64.
struct RowTile {
    int segment, row;
};

// Keys [key, key + keys) of the buffer, and where in the list the segments stand that read any of them.
struct KeyTile {
    int key, keys, first, last;
};

struct Attention {
    const Segment* segments;
    const int64_t* seed;  // one number, on the device
    int64_t rows;         // of q
    int heads;
    int drop_below;     // of 2^16; 0: no dropout
    float scale;        // of the scores
    float keep_factor;  // of weights that are not dropped
};

// ---- memory

// A tile of rows [row, row + 64) of a head; those that are not valid become zeros. Not committed.
template <class T, int D, class Valid>
__device__ __forceinline__ void fetch_rows(T* tile, const T* head, int64_t stride, int64_t row, Valid valid) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < TILE * CHUNKS / THREADS; ++i) {
        int chunk = threadIdx.x + i * THREADS, at = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        bool is_valid = valid(at);
        cp_async_16(tile + at * PITCH<D> + column, is_valid ? head + (row + at) * stride + column : head, is_valid);
    }
}

// Writes an accumulator through the warp's own strip of a tile, whose rows nobody else reads any more.
template <class T, int D>
__device__ __forceinline__ void store_strip(T* strip, const float (&x)[D / 8][4], float factor, float factor_8, T* to,
                                            int64_t stride, int rows) {
    constexpr int CHUNKS = D / 8;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
        T* at = strip + g * PITCH<D> + 8 * j + 2 * t;
        *reinterpret_cast<uint32_t*>(at) = pack2<T>(x[j][0] * factor, x[j][1] * factor);
        *reinterpret_cast<uint32_t*>(at + 8 * PITCH<D>) = pack2<T>(x[j][2] * factor_8, x[j][3] * factor_8);
    }
    __syncwarp();
#pragma unroll
    for (int chunk = lane; chunk < STRIP * CHUNKS; chunk += 32) {
        int row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        if (row < rows)
            *reinterpret_cast<uint4*>(to + row * stride + column) = *reinterpret_cast<uint4*>(strip + row * PITCH<D> + column);
    }
}

// ---- fragments

// Where a lane begins to read: operand A from its rows, or operand B from rows that are its sum index (transposed).
template <int D, class T>
__device__ __forceinline__ const T* lane_of_rows(const T* tile) {
    int lane = threadIdx.x % 32;
    return tile + lane % 16 * PITCH<D> + lane / 16 * 8;
}

// Operand B from rows that are its columns.
template <int D, class T>
__device__ __forceinline__ const T* lane_of_columns(const T* tile) {
    int lane = threadIdx.x % 32;
    return tile + (lane % 8 + lane / 16 * 8) * PITCH<D> + lane / 8 % 2 * 8;
}

// 16 rows as operand A: KEPT in registers, or read again for each use where registers are short.
template <class T, int D, bool KEPT>
struct Strip {
    const T* lane;
    uint32_t kept[KEPT ? D / 16 : 1][4];

    __device__ __forceinline__ void load(const T* strip) {
        lane = lane_of_rows<D>(strip);
        if constexpr (KEPT)
#pragma unroll
            for (int k = 0; k < D / 16; ++k) ldmatrix_x4(kept[k], lane + 16 * k);
    }

    __device__ __forceinline__ void get(int k, uint32_t (&out)[4]) const {
        if constexpr (KEPT)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[i] = kept[k][i];
        else
            ldmatrix_x4(out, lane + 16 * k);
    }
};

// x += a b^T for 16 rows a and GROUPS x 16 rows b; groups that are not `live` stay. b: `lane_of_columns`.
template <class T, int D, int GROUPS, bool KEPT>
__device__ __forceinline__ void add_scores(float (&x)[2 * GROUPS][4], const Strip<T, D, KEPT>& a, const T* b,
                                           uint32_t live) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t rows[4], both[4];
        a.get(k, rows);
#pragma unroll
        for (int n = 0; n < GROUPS; ++n) {
            if (!(live >> n & 1)) continue;
            ldmatrix_x4(both, b + n * 16 * PITCH<D> + k * 16);
            mma_m16n8k16<T>(x[2 * n], rows, {both[0], both[1]});
            mma_m16n8k16<T>(x[2 * n + 1], rows, {both[2], both[3]});
        }
    }
}

// sum += w b for the weights w of 16 rows and GROUPS x 16 rows b, of D columns. b: `lane_of_rows`.
template <class T, int D, int GROUPS>
__device__ __forceinline__ void add_weighted(float (&sum)[D / 8][4], const float (&w)[2 * GROUPS][4], const T* b,
                                             uint32_t live) {
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
        if (!(live >> n & 1)) continue;
        uint32_t weights[4] = {pack2<T>(w[2 * n][0], w[2 * n][1]), pack2<T>(w[2 * n][2], w[2 * n][3]),
                               pack2<T>(w[2 * n + 1][0], w[2 * n + 1][1]), pack2<T>(w[2 * n + 1][2], w[2 * n + 1][3])};
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            uint32_t both[4];
            ldmatrix_x4_trans(both, b + n * 16 * PITCH<D> + d * 16);
            mma_m16n8k16<T>(sum[2 * d], weights, {both[0], both[1]});
            mma_m16n8k16<T>(sum[2 * d + 1], weights, {both[2], both[3]});
        }
    }
}

// ---- who reads whom

// Bit n: rows [row, row_end) and keys [key, key_end) have a pair that is read once one of the two is cut to its nth 16.
__device__ __forceinline__ uint32_t live_key_groups(const Segment& s, int row, int row_end, int key, int groups) {
    uint32_t live = 0;
    for (int n = 0; n < groups; ++n)
        live |= uint32_t{classify(s, row, row_end, key + 16 * n, key + 16 * n + 16) != TILE_EMPTY} << n;
    return live;
}

__device__ __forceinline__ uint32_t live_row_groups(const Segment& s, int row, int key, int key_end, int groups) {
    uint32_t live = 0;
    for (int n = 0; n < groups && row + 16 * n < s.rows; ++n)
        live |= uint32_t{classify(s, row + 16 * n, min(row + 16 * n + 16, s.rows), key, key_end) != TILE_EMPTY} << n;
    return live;
}

// ---- dropout

// Sixteen bits for each pair of rows row, row + 8 and keys key, key + 8, + 16, + 24 of a segment, bit 3 of `row` and bits 3
// and 4 of `key` being 0. Word i is for key + 8 i: its low half for `row`, its high half for row + 8. So a lane owns whole
// draws in the forward and in both backward kernels, and a pair draws the same wherever it stands.
__device__ __forceinline__ uint4 draw(const Attention& a, const Segment& s, int head, int row, int key) {
    uint4 counter = {static_cast<uint32_t>(key), static_cast<uint32_t>(s.row_start + row), static_cast<uint32_t>(head), 0};
    return philox(static_cast<uint64_t>(*a.seed), counter);
}

__device__ __forceinline__ uint32_t word_of(const uint4& bits, int i) {
    return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
}

// Takes the dropped weights out of a strip of rows by GROUPS x 16 keys; `row` and `key` are those of the lane's x[0][0].
template <int GROUPS>
__device__ __forceinline__ void drop(float (&x)[2 * GROUPS][4], const Attention& a, const Segment& s, int head, int row,
                                     int key) {
#pragma unroll
    for (int m = 0; m < GROUPS / 2; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            uint4 bits = draw(a, s, head, row, key + 32 * m + e);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int word = static_cast<int>(word_of(bits, i) & 0xffff), word_8 = static_cast<int>(word_of(bits, i) >> 16);
                if (word < a.drop_below) x[4 * m + i][e] = 0;
                if (word_8 < a.drop_below) x[4 * m + i][2 + e] = 0;
            }
        }
}

// ---- launch

// start(T{}, width): calls it for the dtype and the width of a head.
template <class Start>
int for_each_kind(int64_t dtype, int64_t width, Start start) {
    auto typed = [&](auto sample) -> int {
        switch (width) {
            case 32: return start(sample, std::integral_constant<int, 32>{});
            case 64: return start(sample, std::integral_constant<int, 64>{});
            case 96: return start(sample, std::integral_constant<int, 96>{});
            case 128: return start(sample, std::integral_constant<int, 128>{});
            default: return INVALID_VALUE;
        }
    };
    return dtype == FLOAT16 ? typed(__half{}) : dtype == BFLOAT16 ? typed(__nv_bfloat16{}) : INVALID_VALUE;
}

inline Attention attention_of(const int* segments, const int64_t* seed, int64_t rows, int64_t heads, int64_t drop_below,
                              double scale) {
    float keep_factor = static_cast<float>(65536.0 / (65536.0 - static_cast<double>(drop_below)));
    return {reinterpret_cast<const Segment*>(segments), seed, rows, static_cast<int>(heads), static_cast<int>(drop_below),
            static_cast<float>(scale), keep_factor};
}

// Which keys a row reads, and what that makes of a tile: the arithmetic of `SampleMask`, for host and device.
//
// A segment is eight int32, as in parlance_kernels/sample_attention/mask.py. Its row r (from 0) reads the keys
//
//     [0, prefix + r * prefix_step)  and  [window_start + r * window_step, ... + window_len)
//
// counted from key_start. `SampleMask` has checked that a window never begins inside the prefix and that both lie
// within the keys. Rows and keys below are counted from the beginning of their segment.

#pragma once

#ifdef __CUDACC__
#define PARLANCE_BOTH __host__ __device__ __forceinline__
#else
#define PARLANCE_BOTH inline
#endif

struct Segment {
    int row_start, rows, key_start, prefix, prefix_step, window_start, window_step, window_len;
};

// [0, prefix_end) and [window_first, window_end). Without a window its bounds are equal and say nothing else.
struct RowKeys {
    int prefix_end, window_first, window_end;
};

PARLANCE_BOTH RowKeys row_keys(const Segment& s, int row) {
    int prefix_end = s.prefix + row * s.prefix_step;
    if (s.window_len == 0) return {prefix_end, prefix_end, prefix_end};
    int window_first = s.window_start + row * s.window_step;
    return {prefix_end, window_first, window_first + s.window_len};
}

PARLANCE_BOTH bool reads(const RowKeys& row, int key) {
    return key < row.prefix_end || (key >= row.window_first && key < row.window_end);
}

// What rows [from, to) read together: the longest prefix, and the keys from the first window to the last.
PARLANCE_BOTH RowKeys hull(const Segment& s, int from, int to) {
    RowKeys a = row_keys(s, from), b = row_keys(s, to - 1);
    return {a.prefix_end > b.prefix_end ? a.prefix_end : b.prefix_end,
            a.window_first < b.window_first ? a.window_first : b.window_first,
            a.window_end > b.window_end ? a.window_end : b.window_end};
}

enum TileClass : int { TILE_EMPTY = 0, TILE_PARTIAL = 1, TILE_FULL = 2 };

// Rows [row_from, row_to) by keys [key_from, key_to); neither range is empty and the rows exist.
//
// EMPTY has no pair that is read and FULL none that is not. All bounds are linear in the row, so the first and the last
// row tell. Where the steps are 0 or 1, as in every pattern of this project, PARTIAL has pairs of both kinds, too.
PARLANCE_BOTH TileClass classify(const Segment& s, int row_from, int row_to, int key_from, int key_to) {
    RowKeys a = row_keys(s, row_from), b = row_keys(s, row_to - 1);
    bool past_prefix = key_from >= a.prefix_end && key_from >= b.prefix_end;
    bool before_window = key_to <= a.window_first && key_to <= b.window_first;
    bool past_window = key_from >= a.window_end && key_from >= b.window_end;
    if (past_prefix && (s.window_len == 0 || before_window || past_window)) return TILE_EMPTY;
    if (key_to <= a.prefix_end && key_to <= b.prefix_end) return TILE_FULL;
    // One interval in every row: the window, or prefix and window where they touch.
    bool touch = a.window_first == a.prefix_end && b.window_first == b.prefix_end;
    bool in_window = key_from >= a.window_first && key_from >= b.window_first;
    if ((touch || in_window) && key_to <= a.window_end && key_to <= b.window_end) return TILE_FULL;
    return TILE_PARTIAL;
}

// The key tiles of `width` keys that rows [from, to) read anything of, ascending: tile i begins at key tiles.at(i).
struct KeyTiles {
    int prefix_tiles, skipped, count, width;

    PARLANCE_BOTH int at(int i) const { return (i < prefix_tiles ? i : i + skipped) * width; }
};

PARLANCE_BOTH KeyTiles key_tiles(const Segment& s, int from, int to, int width) {
    RowKeys all = hull(s, from, to);
    int prefix_tiles = (all.prefix_end + width - 1) / width;
    if (s.window_len == 0) return {prefix_tiles, 0, prefix_tiles, width};
    int first = all.window_first / width, end = (all.window_end + width - 1) / width;
    if (first < prefix_tiles) first = prefix_tiles;
    int window_tiles = end > first ? end - first : 0;
    return {prefix_tiles, first - prefix_tiles, prefix_tiles + window_tiles, width};
}

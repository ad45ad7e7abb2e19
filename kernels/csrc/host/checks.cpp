// Entry points for the tests alone: the shared header pair by pair and tile by tile, and kernels that exercise
// (or break) each operation of the emulator.

#include "../device.h"
#include "../philox.h"

extern "C" void simt_reverse(int64_t on) { simt::reverse = on != 0; }

// out[rows, keys], 1 where the row reads the key.
extern "C" void check_reads(const int* segment, int64_t keys, uint8_t* out) {
    const Segment& s = *reinterpret_cast<const Segment*>(segment);
    for (int row = 0; row < s.rows; ++row)
        for (int key = 0; key < keys; ++key) *out++ = reads(row_keys(s, row), key);
}

// Class of each tile [rows / height, keys / width], and 1 in `walked` where `key_tiles` goes.
extern "C" void check_tiles(const int* segment, int64_t keys, int64_t height, int64_t width, uint8_t* out, uint8_t* walked) {
    const Segment& s = *reinterpret_cast<const Segment*>(segment);
    int columns = static_cast<int>((keys + width - 1) / width);
    for (int row = 0; row < s.rows; row += height, out += columns, walked += columns) {
        int stop = min(row + static_cast<int>(height), s.rows);
        for (int i = 0; i < columns; ++i) out[i] = classify(s, row, stop, i * width, min((i + 1) * width, keys));
        KeyTiles tiles = key_tiles(s, row, stop, width);
        for (int i = 0; i < tiles.count; ++i) ++walked[tiles.at(i) / width];
    }
}

extern "C" void check_philox(uint64_t seed, uint32_t* counter) {
    uint4 bits = philox(seed, {counter[0], counter[1], counter[2], counter[3]});
    memcpy(counter, &bits, 16);
}

// c[16, 8] = a[16, 16] b[16, 8] through cp.async, ldmatrix and mma; b by rows, so that its load is transposed.
template <class T>
static void product(const T* a, const T* b, float* c) {
    T* tile_a = reinterpret_cast<T*>(shared_memory());
    T* tile_b = tile_a + 256;
    int lane = threadIdx.x;
    cp_async_16(tile_a + lane * 8, a + lane * 8);
    cp_async_commit();
    cp_async_16(tile_b + lane % 16 * 8, b + lane % 16 * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t fragment_a[4], both_b[4];
    float d[4] = {};
    ldmatrix_x4(fragment_a, tile_a + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x4_trans(both_b, tile_b + lane % 16 * 8);
    mma_m16n8k16<T>(d, fragment_a, {both_b[0], both_b[1]});
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

extern "C" int check_product(const void* a, const void* b, float* c, int64_t dtype) {
    size_t bytes = (256 + 128) * 2;
    if (dtype == FLOAT16)
        return launch(product<__half>, 1, 32, bytes, nullptr, static_cast<const __half*>(a), static_cast<const __half*>(b), c);
    using bf16 = __nv_bfloat16;
    return launch(product<bf16>, 1, 32, bytes, nullptr, static_cast<const bf16*>(a), static_cast<const bf16*>(b), c);
}

// Each case is a mistake; `out` has a number for each of 64 threads.
static void mistake(int kind, const float* in, float* out) {
    float* values = reinterpret_cast<float*>(shared_memory());
    int i = threadIdx.x;
    out[i] = 0;
    if (kind == 0 && i == 5) return;                                   // leaves before a barrier
    if (kind == 1 && i < 32) __syncwarp();                             // half of them in another operation
    if (kind == 1 && i == 40) __shfl_sync(0xffffffffu, 1, 0);          // ... one lane alone
    if (kind == 2) values[64 + i] = 1;                                 // behind the shared memory
    if (kind == 3) cp_async_16(values + 1, in);                        // not aligned
    if (kind == 4) cp_async_16(values + 4 * (i % 16), in + 4 * (i % 16)), cp_async_commit();  // not waited for
    if (kind == 5) values[i] = 1, out[i] = values[(i + 1) % 64];       // no barrier between
    if (kind == 6) values[i] = 1, out[i] = values[(i + 63) % 64];      // nor here
    if (kind == 7) i == 3 ? __syncthreads() : __syncthreads(-1);       // two barriers
    __syncthreads();
    if (kind == 4) out[i] = values[i];
}

extern "C" int check_mistake(int64_t kind, const float* in, float* out) {
    return launch(mistake, 1, 64, 64 * 4, nullptr, static_cast<int>(kind), in, out);
}

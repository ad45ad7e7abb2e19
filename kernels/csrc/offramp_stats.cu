// Entropy, best token, its log-probability, maximum and log-sum-exp of each row of logits, in one pass
// (parlance_kernels/offramp_stats).
//
// Ladder (times: not measured yet, no GPU has run it)
//   1  A block a row; each thread keeps m = max z, s = sum e^(z - m), t = sum (z - m) e^(z - m) and moves its m only when
//      a group of 16 bytes has a larger one. H = ln s - t / s. Logits are read once; a row whose length is odd begins off
//      alignment, so its first numbers are read one by one.

#include <cfloat>

#include "device.h"

constexpr int THREADS = 256, WARPS = THREADS / 32, MOST_BANNED = 16;

// Tokens that are never written. By value, so that no copy to the device comes before the launch.
struct Banned {
    int count, token[MOST_BANNED];

    __device__ __forceinline__ bool has(int other) const {
        for (int i = 0; i < count; ++i)
            if (token[i] == other) return true;
        return false;
    }
};

struct RampSums {
    float m = -FLT_MAX, s = 0, t = 0;  // finite, so that logits of -inf have weight 0
    float best = -INFINITY;
    int token = INT32_MAX;

    // Both become sums of e^(z - top); top is no less than m.
    __device__ __forceinline__ void lift(float top) {
        float down = m - top, factor = fast_exp2(down * LOG2_E);
        if (s > 0) t = (t + down * s) * factor;
        if (s != 0) s *= factor;  // a sum that is not a number stays so
        m = top;
    }

    __device__ __forceinline__ void add(float z) {
        float down = z - m, e = fast_exp2(down * LOG2_E);
        s += e;
        if (e > 0) t += down * e;
    }

    __device__ __forceinline__ void offer(float z, int at) {
        if (z > best || (z == best && at < token)) best = z, token = at;
    }

    __device__ __forceinline__ void join(float m2, float s2, float t2, float best2, int token2) {
        RampSums other;
        other.m = m2, other.s = s2, other.t = t2;
        float top = fmaxf(m, m2);
        lift(top);
        other.lift(top);
        s += other.s, t += other.t;
        offer(best2, token2);
    }
};

__device__ __forceinline__ void join_lanes(RampSums& x) {
    for (int step = 16; step; step /= 2) {
        constexpr uint32_t ALL = 0xffffffffu;
        float m = __shfl_xor_sync(ALL, x.m, step), s = __shfl_xor_sync(ALL, x.s, step), t = __shfl_xor_sync(ALL, x.t, step);
        float best = __shfl_xor_sync(ALL, x.best, step);
        x.join(m, s, t, best, __shfl_xor_sync(ALL, x.token, step));
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    offramp_stats(const T* logits, const __grid_constant__ Banned banned, float* entropy, int64_t* token, float* log_p,
                  float* top, float* lse, int64_t vocabulary) {
    constexpr int SIZE = Vector16<T>::SIZE;
    const T* row = logits + blockIdx.x * vocabulary;
    int v = static_cast<int>(vocabulary), i = threadIdx.x;
    RampSums x;
    auto take = [&](const float* z, int n, int at) {
        float most = z[0];
        for (int k = 1; k < n; ++k) most = fmaxf(most, z[k]);
        if (most > x.m) x.lift(most);
        for (int k = 0; k < n; ++k) x.add(z[k]);
        if (!(most >= x.best)) return;
        for (int k = 0; k < n; ++k)
            if (z[k] >= x.best && !banned.has(at + k)) x.offer(z[k], at + k);
    };
    int head = min(v, static_cast<int>((16 - reinterpret_cast<uint64_t>(row) % 16) % 16 / sizeof(T)));
    int tail = head + (v - head) / SIZE * SIZE;
    for (int at = i < head ? i : i - head + tail; at < v; at += at < head ? v : THREADS) {
        float z = to_float(row[at]);
        take(&z, 1, at);
    }
    for (int at = head + i * SIZE; at < tail; at += THREADS * SIZE) {
        Vector16<T> group = load_16(row + at);
        float z[SIZE];
        for (int k = 0; k < SIZE; ++k) z[k] = to_float(group.at[k]);
        take(z, SIZE, at);
    }
    join_lanes(x);
    RampSums* warps = reinterpret_cast<RampSums*>(shared_memory());
    if (i % 32 == 0) warps[i / 32] = x;
    __syncthreads();
    if (i >= 32) return;
    x = i < WARPS ? warps[i] : RampSums{};
    join_lanes(x);
    if (i) return;
    float log_s = logf(x.s), h = log_s - x.t / x.s;
    entropy[blockIdx.x] = h < 0 ? 0.0f : h;  // rounding; NaN stays
    token[blockIdx.x] = x.token < v ? x.token : 0;
    log_p[blockIdx.x] = (x.best - x.m) - log_s;
    top[blockIdx.x] = x.m;
    lse[blockIdx.x] = x.m + log_s;
}

// banned: `n_banned` numbers on the host.
extern "C" int parlance_offramp_stats(const void* logits, const int64_t* banned, float* entropy, int64_t* token,
                                      float* log_p, float* top, float* lse, int64_t rows, int64_t vocabulary,
                                      int64_t n_banned, int64_t dtype, void* stream) {
    if (n_banned > MOST_BANNED || vocabulary < 1 || vocabulary > INT32_MAX) return INVALID_VALUE;
    Banned never;
    never.count = static_cast<int>(n_banned);
    for (int k = 0; k < never.count; ++k) never.token[k] = static_cast<int>(banned[k]);
    auto start = [&](auto sample) {
        using T = decltype(sample);
        return launch(offramp_stats<T>, dim3(static_cast<unsigned>(rows)), THREADS, WARPS * sizeof(RampSums), stream,
                      static_cast<const T*>(logits), never, entropy, token, log_p, top, lse, vocabulary);
    };
    switch (dtype) {
        case FLOAT32: return start(float{});
        case FLOAT16: return start(__half{});
        case BFLOAT16: return start(__nv_bfloat16{});
        default: return INVALID_VALUE;
    }
}

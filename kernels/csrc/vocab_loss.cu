// Cross-entropy and symmetric KL of a chunk of logits, gradients written over them (parlance_kernels/vocab_loss).
//
// A block has the K rows of one tuple: rows that predict the same token in K streams. With m_a = max z_a and
// u_a = z_a - m_a, pass 1 needs for every stream s_a = sum e^u_a and for every two D_ab = sum e^u_a (u_a - u_b):
//
//     KL(a||b) = D_ab / s_a - ln s_a + ln s_b
//     d/dz_a   = p_a (c_a + sum_b w_ab (u_a - u_b - D_ab / s_a)) + sum_b w_ab (p_a - p_b) - c_a (target and smoothing)
//
// for cross-entropy scales c and pair weights w. Streams that are equal have D = 0 and a gradient of 0 without rounding.
//
// Ladder (times: not measured yet, no GPU has run it)
//   1  A block a tuple, 16 bytes a thread and stream. Sums are kept against a running maximum of each thread that moves
//      only where a group has a larger one, so logits are read from memory once; all streams move at the same time,
//      which keeps the differences of equal streams exactly 0.
//   2  Lanes agree on the maximum before they add, so that a join is one exponential a stream, not one a step.
//   3  Pass 2 goes backwards: what pass 1 read last is still in the caches. The target's column is repaired behind a
//      barrier instead of being compared with at every element.

#include <cfloat>

#include "device.h"

// Every loop over streams and over the numbers of a group is unrolled, or its arrays would lie in memory.
// Three streams want more than the 64 registers that 1,024 threads leave each on sm_80.
constexpr int MOST_THREADS = 512, MOST_WARPS = MOST_THREADS / 32, MOST_TERMS = 16, MOST_PAIRS = 3;

// Factors that the host knows. By value, so that no copy to the device comes before the launch.
struct Factors {
    float ce[MOST_TERMS];     // of each cross-entropy term
    float pair[MOST_PAIRS];   // half of each pair's scale; pairs are (0, 1), (0, 2), (1, 2)
    float smoothing, spread;  // label smoothing, and what each token has of it
    int terms;
};

__host__ __device__ constexpr int pair_of(int a, int b) { return a < b ? b * (b - 1) / 2 + a : a * (a - 1) / 2 + b; }

template <int K>
struct TupleSums {
    float m[K], s[K], z[K], d[K][K];  // z: sum of logits, for label smoothing

    __device__ __forceinline__ TupleSums() {
#pragma unroll
        for (int a = 0; a < K; ++a) {
            m[a] = -FLT_MAX, s[a] = z[a] = 0;  // finite, so that logits of -inf have weight 0
#pragma unroll
            for (int b = 0; b < K; ++b) d[a][b] = 0;
        }
    }

    // Every sum becomes what it is against maxima of `top`, which are no less than m.
    __device__ __forceinline__ void lift(const float (&top)[K]) {
        float down[K];
#pragma unroll
        for (int a = 0; a < K; ++a) down[a] = m[a] - top[a], m[a] = top[a];
#pragma unroll
        for (int a = 0; a < K; ++a) {
            if (s[a] == 0) continue;  // nothing yet; a sum that is not a number stays so
            float factor = fast_exp2(down[a] * LOG2_E);
#pragma unroll
            for (int b = 0; b < K; ++b)
                if (b != a) d[a][b] = factor * (d[a][b] + (down[a] - down[b]) * s[a]);
            s[a] *= factor;
        }
    }

    __device__ __forceinline__ void add(const float (&logit)[K]) {
        float u[K], e[K];
#pragma unroll
        for (int a = 0; a < K; ++a) {
            u[a] = logit[a] - m[a];
            e[a] = fast_exp2(u[a] * LOG2_E);
            s[a] += e[a], z[a] += logit[a];
        }
#pragma unroll
        for (int b = 1; b < K; ++b)
#pragma unroll
            for (int a = 0; a < b; ++a) {
                float apart = u[a] - u[b];
                d[a][b] += e[a] * apart;
                d[b][a] -= e[b] * apart;
            }
    }

    // Joins the sums of all lanes, in every lane.
    __device__ __forceinline__ void join_lanes() {
        float top[K];
#pragma unroll
        for (int a = 0; a < K; ++a) top[a] = warp_max(m[a]);
        lift(top);
#pragma unroll
        for (int a = 0; a < K; ++a) {
            s[a] = warp_sum(s[a]), z[a] = warp_sum(z[a]);
#pragma unroll
            for (int b = 0; b < K; ++b)
                if (b != a) d[a][b] = warp_sum(d[a][b]);
        }
    }
};

// What pass 2 needs of a tuple.
template <int K>
struct Tuple {
    float m[K], inverse[K], constant[K], spread[K], pair[K * (K - 1) / 2 + 1];

    // Gradients but for the target's share. With K = 1, p times the scale.
    __device__ __forceinline__ void gradients(const float (&logit)[K], float (&g)[K]) const {
        float u[K], p[K], t[K];
#pragma unroll
        for (int a = 0; a < K; ++a) {
            u[a] = logit[a] - m[a];
            p[a] = fast_exp2(u[a] * LOG2_E) * inverse[a];
            t[a] = constant[a], g[a] = -spread[a];
        }
#pragma unroll
        for (int b = 1; b < K; ++b)
#pragma unroll
            for (int a = 0; a < b; ++a) {
                float w = pair[pair_of(a, b)], apart = w * (u[a] - u[b]), more = w * (p[a] - p[b]);
                t[a] += apart, t[b] -= apart;
                g[a] += more, g[b] -= more;
            }
#pragma unroll
        for (int a = 0; a < K; ++a) g[a] += p[a] * t[a];
    }
};

// logits: [blocks, K, stride], of which the first `vocabulary` numbers of each row count; ce: [blocks, K]; kl: half of both
// directions, [blocks, pairs]. With `write` the gradients take the place of the logits, and zeros that of the rest.
template <class T, int K>
__global__ void __launch_bounds__(MOST_THREADS)
    vocab_loss_rows(T* logits, const int64_t* target, const int64_t* term, Factors factors, float* ce, float* kl,
                    int64_t vocabulary, int64_t stride, bool write) {
    constexpr int SIZE = Vector16<T>::SIZE, PAIRS = K * (K - 1) / 2;
    TupleSums<K>* warps = reinterpret_cast<TupleSums<K>*>(shared_memory());
    Tuple<K>* shared = reinterpret_cast<Tuple<K>*>(warps + MOST_WARPS);
    T* row = logits + blockIdx.x * K * stride;
    int v = static_cast<int>(vocabulary), groups = v / SIZE, i = threadIdx.x, threads = blockDim.x;

    TupleSums<K> sums;
    for (int group = i; group < groups; group += threads) {
        Vector16<T> read[K];
#pragma unroll
        for (int a = 0; a < K; ++a) read[a] = load_16(row + a * stride + group * SIZE);
        float top[K];
        bool higher = false;
#pragma unroll
        for (int a = 0; a < K; ++a) {
            top[a] = sums.m[a];
#pragma unroll
            for (int k = 0; k < SIZE; ++k) top[a] = fmaxf(top[a], to_float(read[a].at[k]));
            higher |= top[a] > sums.m[a];
        }
        if (higher) sums.lift(top);
#pragma unroll
        for (int k = 0; k < SIZE; ++k) {
            float logit[K];
#pragma unroll
            for (int a = 0; a < K; ++a) logit[a] = to_float(read[a].at[k]);
            sums.add(logit);
        }
    }
    int last = groups * SIZE + i;  // numbers behind the last whole group, one each
    if (last < v) {
        float logit[K], top[K];
#pragma unroll
        for (int a = 0; a < K; ++a) logit[a] = to_float(row[a * stride + last]), top[a] = fmaxf(sums.m[a], logit[a]);
        sums.lift(top);
        sums.add(logit);
    }
    sums.join_lanes();
    if (i % 32 == 0) warps[i / 32] = sums;
    __syncthreads();

    float repaired = 0;  // the gradient at the target of stream i
    int64_t mine = -1;
    if (i < 32) {
        sums = i < threads / 32 ? warps[i] : TupleSums<K>();
        sums.join_lanes();
        Tuple<K> tuple;
        float expected[K][K], log_s[K], hit = 0;
#pragma unroll
        for (int a = 0; a < K; ++a) log_s[a] = logf(sums.s[a]), tuple.m[a] = sums.m[a], tuple.inverse[a] = 1 / sums.s[a];
#pragma unroll
        for (int a = 0; a < K; ++a)
#pragma unroll
            for (int b = 0; b < K; ++b) expected[a][b] = sums.d[a][b] * tuple.inverse[a];
#pragma unroll
        for (int a = 0; a < K; ++a) {
            int64_t at = blockIdx.x * K + a, right = target[at], kind = term[at];
            bool known = right >= 0 && right < v && kind >= 0 && kind < factors.terms;
            float scale = 0;
#pragma unroll
            for (int k = 0; k < MOST_TERMS; ++k)
                if (k == kind) scale = factors.ce[k];
            tuple.spread[a] = scale * factors.spread;
            tuple.constant[a] = scale;
#pragma unroll
            for (int b = 0; b < K; ++b)
                if (b != a) tuple.constant[a] -= factors.pair[pair_of(a, b)] * expected[a][b];
            if (a != i) continue;
            mine = known ? right : -1;
            hit = scale * (1 - factors.smoothing);
            float off = known ? tuple.m[a] - to_float(row[a * stride + right]) : NAN;
            float loss = (1 - factors.smoothing) * (off + log_s[a]);
            if (factors.smoothing != 0) loss += factors.smoothing * (tuple.m[a] - sums.z[a] / vocabulary + log_s[a]);
            ce[at] = loss;
        }
#pragma unroll
        for (int b = 1; b < K; ++b)
#pragma unroll
            for (int a = 0; a < b; ++a) {
                int pair = pair_of(a, b);
                tuple.pair[pair] = factors.pair[pair];
                if (i == 0) kl[blockIdx.x * PAIRS + pair] = 0.5f * (expected[a][b] + expected[b][a]);
            }
        if (write && mine >= 0) {
            float logit[K], g[K];
#pragma unroll
            for (int a = 0; a < K; ++a) logit[a] = to_float(row[a * stride + mine]);
            tuple.gradients(logit, g);
#pragma unroll
            for (int a = 0; a < K; ++a)
                if (a == i) repaired = g[a] - hit;
        }
        if (i == 0) *shared = tuple;
    }
    if (!write) return;
    __syncthreads();

    Tuple<K> tuple = *shared;
    int rounds = (groups + threads - 1) / threads;
    if (last < v) {
        float logit[K], g[K];
#pragma unroll
        for (int a = 0; a < K; ++a) logit[a] = to_float(row[a * stride + last]);
        tuple.gradients(logit, g);
#pragma unroll
        for (int a = 0; a < K; ++a) row[a * stride + last] = from_float<T>(g[a]);
    }
    for (int64_t rest = v + i; rest < stride; rest += threads)
#pragma unroll
        for (int a = 0; a < K; ++a) row[a * stride + rest] = from_float<T>(0.0f);
    for (int group = (rounds - 1) * threads + i; group >= 0; group -= threads) {
        if (group >= groups) continue;
        Vector16<T> read[K];
#pragma unroll
        for (int a = 0; a < K; ++a) read[a] = load_16(row + a * stride + group * SIZE);
#pragma unroll
        for (int k = 0; k < SIZE; ++k) {
            float logit[K], g[K];
#pragma unroll
            for (int a = 0; a < K; ++a) logit[a] = to_float(read[a].at[k]);
            tuple.gradients(logit, g);
#pragma unroll
            for (int a = 0; a < K; ++a) read[a].at[k] = from_float<T>(g[a]);
        }
#pragma unroll
        for (int a = 0; a < K; ++a) store_16(row + a * stride + group * SIZE, read[a]);
    }
    __syncthreads();
    if (mine >= 0) row[i * stride + mine] = from_float<T>(repaired);
}

template <int K>
constexpr size_t shared_bytes = MOST_WARPS * sizeof(TupleSums<K>) + sizeof(Tuple<K>);

// ce_scale: `terms` numbers and pair_scale: `streams` (streams - 1) / 2, both on the host. target, term: `tuples * streams`.
extern "C" int parlance_vocab_loss(void* logits, const int64_t* target, const int64_t* term, const double* ce_scale,
                                   const double* pair_scale, float* ce, float* kl, int64_t tuples, int64_t streams,
                                   int64_t vocabulary, int64_t stride, int64_t terms, int64_t write, int64_t threads,
                                   int64_t dtype, double smoothing, void* stream) {
    uint64_t bytes = stride * (dtype == FLOAT32 ? 4 : 2);
    bool aligned = (bytes | reinterpret_cast<uint64_t>(logits)) % 16 == 0;
    if (!aligned || terms > MOST_TERMS || streams < 1 || streams > 3 || vocabulary < 1 || vocabulary > stride ||
        stride > INT32_MAX || threads < 32 || threads > MOST_THREADS || threads % 32)
        return INVALID_VALUE;
    Factors factors = {};
    for (int64_t k = 0; k < terms; ++k) factors.ce[k] = static_cast<float>(ce_scale[k]);
    for (int64_t k = 0; k < streams * (streams - 1) / 2; ++k) factors.pair[k] = static_cast<float>(0.5 * pair_scale[k]);
    factors.smoothing = static_cast<float>(smoothing);
    factors.spread = static_cast<float>(smoothing / static_cast<double>(vocabulary));
    factors.terms = static_cast<int>(terms);
    auto start = [&](auto kernel, size_t smem, auto sample) {
        return launch(kernel, dim3(static_cast<unsigned>(tuples)), dim3(static_cast<unsigned>(threads)), smem, stream,
                      static_cast<decltype(sample)*>(logits), target, term, factors, ce, kl, vocabulary, stride, write != 0);
    };
    auto with = [&](auto sample) {
        using T = decltype(sample);
        if (streams == 1) return start(vocab_loss_rows<T, 1>, shared_bytes<1>, sample);
        if (streams == 2) return start(vocab_loss_rows<T, 2>, shared_bytes<2>, sample);
        return start(vocab_loss_rows<T, 3>, shared_bytes<3>, sample);
    };
    switch (dtype) {
        case FLOAT32: return with(float{});
        case FLOAT16: return with(__half{});
        case BFLOAT16: return with(__nv_bfloat16{});
        default: return INVALID_VALUE;
    }
}

constexpr int MOST_SUMS = 2 * MOST_TERMS;

// One of the sums each: scale of a term or pair, and which column of `kl` a pair is, -1 for a stream with itself.
struct Sums {
    float scale[MOST_SUMS];
    int column[MOST_SUMS], terms, count;
};

// sums[j]: of a term over the rows that have it, or of a pair over all tuples, in one order whatever the grid. A block each.
__global__ void __launch_bounds__(MOST_THREADS)
    vocab_loss_sums(const float* ce, const int64_t* term, const float* kl, Sums all, float* sums, int64_t rows,
                    int64_t tuples, int64_t pairs) {
    int j = blockIdx.x, i = threadIdx.x;
    float sum = 0;
    if (j < all.terms) {
        for (int64_t r = i; r < rows; r += MOST_THREADS) {
            int64_t kind = term[r];
            if (kind == j || kind < 0 || kind >= all.terms) sum += ce[r];  // an unknown term spoils every sum
        }
    } else {
        int column = -1;
        for (int k = 0; k < MOST_SUMS; ++k)
            if (k == j) column = all.column[k];
        if (column >= 0)
            for (int64_t p = i; p < tuples; p += MOST_THREADS) sum += kl[p * pairs + column];
    }
    float* warps = reinterpret_cast<float*>(shared_memory());
    sum = warp_sum(sum);
    if (i % 32 == 0) warps[i / 32] = sum;
    __syncthreads();
    if (i >= 32) return;
    sum = warp_sum(i < MOST_WARPS ? warps[i] : 0);
    if (i == 0) sums[j] = sum;
}

// total = sum of scale times sum, in their order.
__global__ void __launch_bounds__(32) vocab_loss_total(const float* sums, Sums all, float* total) {
    if (threadIdx.x) return;
    float sum = 0;
    for (int j = 0; j < all.count; ++j) sum += all.scale[j] * sums[j];
    *total = sum;
}

// sums: `terms` of cross-entropy, then `n_pairs` of KL; scale: as many numbers, and column: `n_pairs`, on the host.
extern "C" int parlance_vocab_loss_sums(const float* ce, const int64_t* term, const float* kl, const double* scale,
                                        const int64_t* column, float* sums, float* total, int64_t rows, int64_t tuples,
                                        int64_t pairs, int64_t terms, int64_t n_pairs, void* stream) {
    if (terms > MOST_TERMS || n_pairs > MOST_TERMS) return INVALID_VALUE;
    Sums all = {};
    all.terms = static_cast<int>(terms), all.count = static_cast<int>(terms + n_pairs);
    for (int k = 0; k < all.count; ++k) all.scale[k] = static_cast<float>(scale[k]);
    for (int k = 0; k < n_pairs; ++k) all.column[all.terms + k] = static_cast<int>(column[k]);
    int error = launch(vocab_loss_sums, dim3(static_cast<unsigned>(all.count)), MOST_THREADS, MOST_WARPS * sizeof(float),
                       stream, ce, term, kl, all, sums, rows, tuples, pairs);
    return error ? error : launch(vocab_loss_total, 1, 32, 0, stream, sums, all, total);
}

// What kernels use instead of raw PTX. Under nvcc these are intrinsics and inline PTX; under g++ host/simt.h supplies the
// same names and runs kernels thread by thread on a CPU (see README.md).
//
// Rules that keep both worlds alike: shared memory is dynamic only (`shared_memory`), warp operations take all 32 lanes,
// blocks are multiples of 32 threads, and kernels are started with `launch`.

#pragma once
#include "row_interval.h"

#ifdef __CUDACC__

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Starts a kernel and returns the error, 0 where there is none. An empty grid is no launch.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    if (smem > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
        if (error != cudaSuccess) return cudaGetLastError();
    }
    kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
    return cudaGetLastError();
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(16) char parlance_shared[];
    return parlance_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory behind the thread's back, or zeros where not `valid`. Both sides 16-byte aligned;
// `from` must be a mapped address even where not valid. Visible after commit and wait (and a barrier for others).
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `LATER` of this thread's last groups are under way.
template <int LATER>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8, 16 bytes, aligned.
// Register j of lane i is then of matrix j: row i / 4, elements 2 (i % 4) and the next (PTX ISA, "ldmatrix").
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices: register j of lane i has elements i / 4 of rows 2 (i % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a b for a 16x16, b 16x8 and d 16x8, products of T (__half or __nv_bfloat16) summed in fp32.
//
// With g = lane / 4 and t = lane % 4 a lane holds (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type";
// the element with the lower column or row is in the low half of a register)
//     a[0] = A[g][2t, 2t+1]      a[1] = A[g+8][2t, 2t+1]      a[2] = A[g][2t+8, 2t+9]      a[3] = A[g+8][2t+8, 2t+9]
//     b[0] = B[2t, 2t+1][g]      b[1] = B[2t+8, 2t+9][g]
//     d[0], d[1] = D[g][2t, 2t+1]          d[2], d[3] = D[g+8][2t, 2t+1]
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two 16-bit numbers in a register, `low` in its low half, as mma and ldmatrix have them; to the nearest, ties to even.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, 4);
    return bits;
}

template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, 4);
    return bits;
}

// 2^x in one instruction, relative error 2^-22; denormals are zero.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else
#include "host/simt.h"
#endif

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// The codes that launchers take for a dtype; `library.dtype_code` gives them.
enum Dtype : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
// A launcher that does not know an argument says so (cudaErrorInvalidValue).
constexpr int INVALID_VALUE = 1;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to the nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes as numbers of T.
template <class T>
struct alignas(16) Vector16 {
    static constexpr int SIZE = 16 / sizeof(T);
    T at[SIZE];
};

template <class T>
__device__ __forceinline__ Vector16<T> load_16(const T* from) {
    uint4 bits = *reinterpret_cast<const uint4*>(from);
    Vector16<T> out;
    memcpy(&out, &bits, 16);
    return out;
}

template <class T>
__device__ __forceinline__ void store_16(T* to, const Vector16<T>& numbers) {
    uint4 bits;
    memcpy(&bits, &numbers, 16);
    *reinterpret_cast<uint4*>(to) = bits;
}

// Of all lanes, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Sum over the 4 lanes that share a row of an mma accumulator (lanes 4g .. 4g + 3), in each of them.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

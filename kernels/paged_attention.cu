// Decode attention over paged keys and values: one query token of each sequence against all that its block table names.
// The CPU twin is src/engine/ops/attention.rs; `weir bench kernels` compares the two.
//
// A block holds 32 positions of all layers in f16, layer after layer; of a layer first the keys,
// [key head][element / 8][position][8 elements], so that a warp whose lanes are positions reads 512 neighbouring bytes at once;
// then the values, [key head][position][element], so that a warp whose lanes are elements reads whole rows.
//
// One thread block takes one key head of one sequence, with all query heads that share it, and one part ("split") of the
// sequence's blocks: long sequences then fill the machine, too (flash decoding, Dao et al. 2023). Its warps take blocks in turn
// and keep an online softmax each (Milakov and Gimelshein 2018); sums are f32. With more than one split, `combine` joins them.

#include <cuda_fp16.h>
#include <math_constants.h>

namespace {

constexpr int POSITIONS = 32;
constexpr int WARPS = 4;
constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// Neighbouring elements of a row of values, as many as each lane has.
template <int E>
__device__ __forceinline__ void load(const __half* at, float (&out)[E]) {
    if constexpr (E == 1) {
        out[0] = __half2float(*at);
    } else if constexpr (E == 2) {
        float2 pair = __half22float2(*reinterpret_cast<const __half2*>(at));
        out[0] = pair.x, out[1] = pair.y;
    } else {
        static_assert(E == 4);
        uint2 raw = *reinterpret_cast<const uint2*>(at);
        float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
        float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
        out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
    }
}

// Weight of a part with greatest score `m` beside one with `most`: nothing where there were no scores.
__device__ __forceinline__ float share(float m, float most) {
    return m == -CUDART_INF_F ? 0.0f : expf(m - most);
}

struct Sizes {
    // Halves from one block to the next, and from a block's beginning to the layer.
    long long block_stride;
    long long layer;
    // Entries of each sequence's block table.
    int table_stride;
    int key_heads;
    int splits;
    float scale;
};

template <int HEAD, int GROUP>
__device__ void decode(const float* __restrict__ q, const __half* __restrict__ blocks, const int* __restrict__ tables,
                       const int* __restrict__ lengths, const Sizes& sizes, float* __restrict__ partial,
                       float* __restrict__ out) {
    constexpr int E = HEAD / 32;
    __shared__ float query[GROUP][HEAD];
    __shared__ float greatest[WARPS][GROUP], total[WARPS][GROUP];
    __shared__ float sums[WARPS][GROUP][HEAD];

    const int head = blockIdx.x, sequence = blockIdx.y, split = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int heads = sizes.key_heads * GROUP;
    const float* mine = q + ((long long)sequence * heads + head * GROUP) * HEAD;
    for (int i = threadIdx.x; i < GROUP * HEAD; i += WARPS * 32) query[i / HEAD][i % HEAD] = mine[i] * sizes.scale;
    __syncthreads();

    const int length = lengths[sequence];
    const int count = (length + POSITIONS - 1) / POSITIONS;
    const int begin = (int)((long long)count * split / sizes.splits);
    const int end = (int)((long long)count * (split + 1) / sizes.splits);

    float m[GROUP], l[GROUP], acc[GROUP][E];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        m[g] = -CUDART_INF_F, l[g] = 0.0f;
#pragma unroll
        for (int e = 0; e < E; e++) acc[g][e] = 0.0f;
    }

    for (int b = begin + warp; b < end; b += WARPS) {
        const __half* layer = blocks + (long long)tables[(long long)sequence * sizes.table_stride + b] * sizes.block_stride + sizes.layer;
        const __half* values = layer + (long long)(sizes.key_heads + head) * HEAD * POSITIONS + lane * E;
        const uint4* keys = reinterpret_cast<const uint4*>(layer + (long long)head * HEAD * POSITIONS) + lane;
        const int seen = min(POSITIONS, length - b * POSITIONS);

        float p[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) p[g] = 0.0f;
#pragma unroll 4
        for (int c = 0; c < HEAD / 8; c++) {
            const uint4 raw = keys[c * POSITIONS];
            const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 k = __half22float2(pairs[i]);
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    p[g] = fmaf(query[g][c * 8 + 2 * i], k.x, p[g]);
                    p[g] = fmaf(query[g][c * 8 + 2 * i + 1], k.y, p[g]);
                }
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            // What lies behind the end is unknown, perhaps no number at all.
            const float score = lane < seen ? p[g] : -CUDART_INF_F;
            const float most = fmaxf(m[g], warp_max(score));
            const float before = share(m[g], most);
            p[g] = lane < seen ? expf(score - most) : 0.0f;
            l[g] = l[g] * before + warp_sum(p[g]);
            m[g] = most;
#pragma unroll
            for (int e = 0; e < E; e++) acc[g][e] *= before;
        }
        auto add = [&](int j) {
            float v[E];
            load<E>(values + j * HEAD, v);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const float weight = __shfl_sync(ALL, p[g], j);
#pragma unroll
                for (int e = 0; e < E; e++) acc[g][e] = fmaf(weight, v[e], acc[g][e]);
            }
        };
        if (seen == POSITIONS) {
#pragma unroll 8
            for (int j = 0; j < POSITIONS; j++) add(j);
        } else {
            for (int j = 0; j < seen; j++) add(j);
        }
    }

#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        if (lane == 0) greatest[warp][g] = m[g], total[warp][g] = l[g];
#pragma unroll
        for (int e = 0; e < E; e++) sums[warp][g][lane * E + e] = acc[g][e];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * HEAD; i += WARPS * 32) {
        const int g = i / HEAD, element = i % HEAD;
        float most = -CUDART_INF_F;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, greatest[w][g]);
        float sum = 0.0f, weight = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            const float part = share(greatest[w][g], most);
            sum = fmaf(sums[w][g][element], part, sum);
            weight = fmaf(total[w][g], part, weight);
        }
        const long long row = (long long)sequence * heads + head * GROUP + g;
        if (sizes.splits == 1) {
            out[row * HEAD + element] = sum / weight;
        } else {
            float* to = partial + (row * sizes.splits + split) * (HEAD + 2);
            to[element] = sum;
            if (element == 0) to[HEAD] = most, to[HEAD + 1] = weight;
        }
    }
}

}  // namespace

// Joins the splits of each query head: `partial` is [sequence][query head][split][head elements, greatest score, sum of weights].
extern "C" __global__ void paged_attention_combine(const float* __restrict__ partial, int head, int splits,
                                                   float* __restrict__ out) {
    const long long row = blockIdx.x;
    const float* mine = partial + row * splits * (head + 2);
    float most = -CUDART_INF_F;
    for (int s = 0; s < splits; s++) most = fmaxf(most, mine[s * (head + 2) + head]);
    for (int element = threadIdx.x; element < head; element += blockDim.x) {
        float sum = 0.0f, weight = 0.0f;
        for (int s = 0; s < splits; s++) {
            const float* part = mine + s * (head + 2);
            const float factor = share(part[head], most);
            sum = fmaf(part[element], factor, sum);
            weight = fmaf(part[head + 1], factor, weight);
        }
        out[row * head + element] = sum / weight;
    }
}

// q and out: [sequence][query head][HEAD]; tables: [sequence][table_stride] numbers of blocks; lengths: positions of each
// sequence, the query's own included, at least 1. Grid: key heads, sequences, splits; 128 threads.
#define DECODE(HEAD, GROUP)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) paged_attention_decode_##HEAD##_##GROUP(                          \
        const float* __restrict__ q, const __half* __restrict__ blocks, const int* __restrict__ tables,                       \
        const int* __restrict__ lengths, long long block_stride, long long layer, int table_stride, int key_heads,            \
        int splits, float scale, float* __restrict__ partial, float* __restrict__ out) {                                      \
        const Sizes sizes{block_stride, layer, table_stride, key_heads, splits, scale};                                       \
        decode<HEAD, GROUP>(q, blocks, tables, lengths, sizes, partial, out);                                                 \
    }
#define GROUPS(HEAD)                                                                                       \
    DECODE(HEAD, 1) DECODE(HEAD, 2) DECODE(HEAD, 3) DECODE(HEAD, 4) DECODE(HEAD, 5) DECODE(HEAD, 6) DECODE(HEAD, 7) \
    DECODE(HEAD, 8)
GROUPS(32)
GROUPS(64)
GROUPS(128)

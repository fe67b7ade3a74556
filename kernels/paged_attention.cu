// Decode attention over paged keys and values: one query token of each sequence against all that its spans name.
// The CPU twin is src/engine/ops/attention.rs; `weir bench kernels` compares the two.
//
// A block holds 32 positions of all layers in f16, layer after layer; of a layer first the keys,
// [key head][element / 8][position][8 elements], so that a warp whose lanes are positions reads 512 neighbouring bytes at once;
// then the values, [key head][position][element], so that a warp whose lanes are elements reads whole rows.
//
// A span is some neighbouring places of one block. Its keys may have been rotated for another position than the one they stand
// at, when a document's blocks are used in several sequences: then the query is turned back by the difference, and the keys stay
// as they are. What a local window does not show is not in the table; the host has cut it off.
//
// One thread block takes one key head of one sequence, with all query heads that share it, and one part ("split") of the
// sequence's spans: long sequences then fill the machine, too (flash decoding, Dao et al. 2023). Each of its warps takes
// neighbouring spans, so that it seldom has to turn the query, and keeps an online softmax (Milakov and Gimelshein 2018); sums
// are f32. With more than one split, `combine` joins them.

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

// A row of the span table, as span_table.rs packs it.
struct Span {
    int block;
    // The first place in the block, and how many follow each other; at least one.
    int from;
    int len;
    // Row of the rotations; negative where the query stays as it is.
    int turn;
};

struct Sizes {
    // Halves from one block to the next, and from a block's beginning to the layer.
    long long block_stride;
    long long layer;
    int key_heads;
    int splits;
    float scale;
};

template <int HEAD, int GROUP>
__device__ void decode(const float* __restrict__ q, const __half* __restrict__ blocks, const int4* __restrict__ spans,
                       const int* __restrict__ begins, const float2* __restrict__ turns, const Sizes& sizes,
                       float* __restrict__ partial, float* __restrict__ out) {
    constexpr int E = HEAD / 32;
    // The query, then each warp's own: first the query as it has turned it, and when it is done with that, its sums.
    __shared__ float query[1 + WARPS][GROUP][HEAD];
    __shared__ float greatest[WARPS][GROUP], total[WARPS][GROUP];
    float (*const sums)[GROUP][HEAD] = query + 1;

    const int head = blockIdx.x, sequence = blockIdx.y, split = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int heads = sizes.key_heads * GROUP;
    const float* mine = q + ((long long)sequence * heads + head * GROUP) * HEAD;
    for (int i = threadIdx.x; i < GROUP * HEAD; i += WARPS * 32) query[0][i / HEAD][i % HEAD] = mine[i] * sizes.scale;
    __syncthreads();

    // This warp's spans, of all warps of all splits.
    const int first = begins[sequence], count = begins[sequence + 1] - first;
    const int part = split * WARPS + warp, parts = sizes.splits * WARPS;
    const int begin = first + (int)((long long)count * part / parts);
    const int end = first + (int)((long long)count * (part + 1) / parts);

    float m[GROUP], l[GROUP], acc[GROUP][E];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        m[g] = -CUDART_INF_F, l[g] = 0.0f;
#pragma unroll
        for (int e = 0; e < E; e++) acc[g][e] = 0.0f;
    }

    // The rotation that this warp's own query has gone through.
    int turned = -1;
    for (int s = begin; s < end; s++) {
        // One load, whereas a struct of four might be four.
        const int4 raw_span = spans[s];
        const Span span{raw_span.x, raw_span.y, raw_span.z, raw_span.w};
        // The same for all lanes, and seldom true: a document's spans follow each other.
        if (span.turn >= 0 && span.turn != turned) {
            turned = span.turn;
            const float2* angles = turns + (long long)turned * (HEAD / 2);
            __syncwarp();
            // Neighbouring elements are a pair, as in elementwise::rope. Not unrolled: that would take registers from the rest.
#pragma unroll 1
            for (int i = lane; i < GROUP * HEAD / 2; i += 32) {
                const int g = i / (HEAD / 2), pair = i % (HEAD / 2);
                const float2 angle = angles[pair];
                const float a = query[0][g][2 * pair], b = query[0][g][2 * pair + 1];
                query[1 + warp][g][2 * pair] = a * angle.x - b * angle.y;
                query[1 + warp][g][2 * pair + 1] = a * angle.y + b * angle.x;
            }
            __syncwarp();
        }
        const __half* layer = blocks + span.block * sizes.block_stride + sizes.layer;
        const __half* values = layer + (long long)(sizes.key_heads + head) * HEAD * POSITIONS + lane * E;
        // What lies beside the span is unknown, perhaps no number at all, and need not be read.
        const int last = span.from + span.len - 1;
        const int place = min(max(lane, span.from), last);
        const bool seen = lane == place;
        const uint4* keys = reinterpret_cast<const uint4*>(layer + (long long)head * HEAD * POSITIONS) + place;
        const float (*const asked)[HEAD] = query[span.turn < 0 ? 0 : 1 + warp];

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
                    p[g] = fmaf(asked[g][c * 8 + 2 * i], k.x, p[g]);
                    p[g] = fmaf(asked[g][c * 8 + 2 * i + 1], k.y, p[g]);
                }
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float score = seen ? p[g] : -CUDART_INF_F;
            const float most = fmaxf(m[g], warp_max(score));
            const float before = share(m[g], most);
            p[g] = seen ? expf(score - most) : 0.0f;
            l[g] = l[g] * before + warp_sum(p[g]);
            m[g] = most;
#pragma unroll
            for (int e = 0; e < E; e++) acc[g][e] *= before;
        }
        // Adds a row of values with the weight that a lane has.
        auto add = [&](int row, int from) {
            float v[E];
            load<E>(values + row * HEAD, v);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const float weight = __shfl_sync(ALL, p[g], from);
#pragma unroll
                for (int e = 0; e < E; e++) acc[g][e] = fmaf(weight, v[e], acc[g][e]);
            }
        };
        if (span.len == POSITIONS) {
#pragma unroll 8
            for (int j = 0; j < POSITIONS; j++) add(j, j);
        } else {
            // Eight at once, so that their loads do not wait for each other. Behind the last there are only lanes without a
            // weight (no lane comes twice, as there are no more than 32), which add nothing of a row that was read anyway.
            for (int j = span.from; j <= last; j += 8) {
#pragma unroll
                for (int i = 0; i < 8; i++) add(min(j + i, last), (j + i) % 32);
            }
        }
    }

    // The sums go where the turned query was.
    __syncwarp();
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

// q and out: [sequence][query head][HEAD]; spans: [span], all of one sequence, then all of the next; begins: [sequences + 1],
// where each sequence's begin, at least one each; turns: [turn][HEAD / 2] cosines and sines. Grid: key heads, sequences,
// splits; 128 threads.
#define DECODE(HEAD, GROUP)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) paged_attention_decode_##HEAD##_##GROUP(                         \
        const float* __restrict__ q, const __half* __restrict__ blocks, const int4* __restrict__ spans,                       \
        const int* __restrict__ begins, const float2* __restrict__ turns, long long block_stride, long long layer,            \
        int key_heads, int splits, float scale, float* __restrict__ partial, float* __restrict__ out) {                       \
        const Sizes sizes{block_stride, layer, key_heads, splits, scale};                                                     \
        decode<HEAD, GROUP>(q, blocks, spans, begins, turns, sizes, partial, out);                                            \
    }
#define GROUPS(HEAD)                                                                                       \
    DECODE(HEAD, 1) DECODE(HEAD, 2) DECODE(HEAD, 3) DECODE(HEAD, 4) DECODE(HEAD, 5) DECODE(HEAD, 6) DECODE(HEAD, 7) \
    DECODE(HEAD, 8)
GROUPS(32)
GROUPS(64)
GROUPS(128)

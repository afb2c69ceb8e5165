// 3x3 convolution with stride 1 and padding 1 on channels-last maps, forward and backward, by minimal filtering
// F(4x4, 3x3) (Winograd 1980; Lavin and Gray, CVPR 2016, section 4): 36 products in place of 144 for each tile of 4 x 4
// outputs, behind a C interface that winograd.py calls.
//
//   forward     Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A     d: 6 x 6 inputs, g: 3 x 3 weights, Y: 4 x 4 outputs
//   weights     dg = G^T [ sum over tiles of (A dY A^T) * (B^T d B) ] G
//   input       the forward one, of dY with the weights turned round and in and out exchanged
//
// The products of one of the 36 positions, over all tiles and channels, are a matrix product: of float32, or, for maps
// in bfloat16, of factors rounded to bfloat16, summed in float32, where the processor has that operation.
//
// Every number is summed in the same order whatever the number of threads. Compile with -ffp-contract=fast.

#include "winograd_tiles.h"

namespace {

// Registers hold kRows x kVectors vectors of sums.
constexpr int kRows = 6;
#ifdef __AVX512F__
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif
constexpr int64_t kPanel = kVectors * kLanes;  // output channels whose weights lie together

// ---- Matrix products.

template <typename E> struct Row {
    typedef Float16 Vector;
};
inline Float16 multiply_add(Float16 sum, float factor, Float16 row) { return sum + factor * row; }

#ifdef __AVX512BF16__
typedef Pair NarrowFactor;  // of maps in bfloat16
template <> struct Row<Pair> {
    typedef Bits16 Vector;
};
inline Float16 multiply_add(Float16 sum, Pair factor, Bits16 row) {
    return Float16(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(int(factor.bits))), __m512bh(row)));
}
#else
typedef float NarrowFactor;
#endif

// c(r, :) = [c(r, :) +] sum over k of x(r, k) * w(k, :), for R rows and the vectors of one panel, in registers.
// x(r, k) lies at x[r * x_step + k], or if Transposed at x[k * x_step + r].
template <int R, int V, bool Transposed, typename E>
void multiply_block(int64_t depth, const E* __restrict x, int64_t x_step, const E* __restrict w, int64_t w_step,
                    float* __restrict c, int64_t c_step, bool add) {
    typedef typename Row<E>::Vector Vector;
    Float16 sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[r][v] = add ? load<Float16>(c + r * c_step + v * kLanes) : Float16{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) row[v] = load<Vector>(w + k * w_step + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const E factor = Transposed ? x[k * x_step + r] : x[r * x_step + k];
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(sums[r][v], factor, row[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(c + r * c_step + v * kLanes, sums[r][v]);
}

template <int V, bool Transposed, typename E>
void multiply_panel(int64_t rows, int64_t depth, const E* x, int64_t x_step, const E* w, int64_t w_step,
                    float* c, int64_t c_step, bool add) {
    const int64_t next = Transposed ? 1 : x_step;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        multiply_block<kRows, V, Transposed>(depth, x + r * next, x_step, w, w_step, c + r * c_step, c_step, add);
    for (; r + 2 <= rows; r += 2)
        multiply_block<2, V, Transposed>(depth, x + r * next, x_step, w, w_step, c + r * c_step, c_step, add);
    for (; r < rows; ++r)
        multiply_block<1, V, Transposed>(depth, x + r * next, x_step, w, w_step, c + r * c_step, c_step, add);
}

// The same for a panel of `width` channels.
template <bool Transposed, typename E>
void multiply(int64_t width, int64_t rows, int64_t depth, const E* x, int64_t x_step, const E* w,
              int64_t w_step, float* c, int64_t c_step, bool add) {
    const int64_t vectors = width / kLanes;
    if (vectors == kVectors) {
        multiply_panel<kVectors, Transposed>(rows, depth, x, x_step, w, w_step, c, c_step, add);
    } else {  // what is left of the channels
        for (int64_t v = 0; v < vectors; ++v)
            multiply_panel<1, Transposed>(rows, depth, x, x_step, w + v * kLanes, w_step, c + v * kLanes, c_step, add);
    }
}

// ---- The whole operations.

// A block of kLanes x kLanes weights at one or nine places of the kernel, with the output channels in vectors.
struct WeightBlock {
    Float16 of[9 * kLanes];
    int64_t c_step, i_step;  // between vectors of neighbouring input channels, and places

    // Of output channels from o, input channels from c.
    void read(const Problem& p, int64_t o, int64_t c) {
        const float* from = p.weights + o * p.strides[0] + c * p.strides[1];
        const bool rows = p.strides[2] == 3 * p.strides[3];
        const bool contiguous = rows && p.strides[3] == 1 && p.strides[1] == 9;
        const bool channels_last = rows && p.strides[1] == 1;
        c_step = contiguous ? 9 : 1;
        i_step = contiguous ? 1 : kLanes;
        if (contiguous || channels_last) {
            for (int64_t i = 0; i < 9; ++i)
                transpose(from + (contiguous ? i * kLanes : i * p.strides[3]), p.strides[0], of + i * kLanes);
        } else {
            for (int64_t i = 0; i < 9; ++i)
                for (int64_t k = 0; k < kLanes; ++k)
                    for (int64_t r = 0; r < kLanes; ++r)
                        of[i * kLanes + k][r] = from[r * p.strides[0] + k * p.strides[1] + i / 3 * p.strides[2] +
                                                     i % 3 * p.strides[3]];
        }
        if (p.scale) {
            const Float16 scale = load<Float16>(p.scale + o);
            for (auto& vector : of) vector *= scale;
        }
    }
    const Float16& at(int64_t c, int64_t i) const { return of[c * c_step + i * i_step]; }
};

// G g G^T of all weights as (36, panel, C / kTerms<E>, channels of the panel).
template <typename E> void pack_weights(const Problem& p, E* packed) {
    const WeightTransform transform;
    const auto& g = transform.g;
    const int64_t C = p.in_channels, O = p.out_channels, blocks_in = C / kLanes, blocks = blocks_in * (O / kLanes);
    std::atomic<int64_t> next{0};
    in_threads(std::min(p.num_threads, blocks), [&] {
        WeightBlock weights;
        for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
            const int64_t c0 = block % blocks_in * kLanes, o0 = block / blocks_in * kLanes;
            weights.read(p, o0, c0);
            const int64_t panel = o0 / kPanel * kPanel, width = std::min(kPanel, O - panel);
            for (int64_t c = 0; c < kLanes; c += kTerms<E>) {
                Float16 d[2][kPositions];
                for (int64_t term = 0; term < kTerms<E>; ++term) {
                    Float16 w[9], t[kIn * 3];
                    for (int i = 0; i < 9; ++i) w[i] = weights.at(c + term, i);
                    for (int i = 0; i < kIn; ++i)
                        for (int x = 0; x < 3; ++x)
                            t[i * 3 + x] = g[i][0] * w[x] + g[i][1] * w[3 + x] + g[i][2] * w[6 + x];
                    for (int i = 0; i < kPositions; ++i) {
                        const Float16* row = t + i / kIn * 3;
                        const float* of = g[i % kIn];
                        d[term][i] = of[0] * row[0] + of[1] * row[1] + of[2] * row[2];
                    }
                }
                E* to = packed + (panel * C + (c0 + c) * width) / kTerms<E> + (o0 - panel);
                for (int i = 0; i < kPositions; ++i) store_terms(to + i * C * O / kTerms<E>, d[0][i], d[1][i]);
            }
        }
    });
}

// Maps of T, factors of E.
template <typename T, typename E> void convolve(const Problem& p) {
    const Tiles tiles(p);
    const int64_t C = p.in_channels, O = p.out_channels, depth = C / kTerms<E>;
    Workspace own_packed(p.packed ? 0 : kPositions * depth * O);
    if (!p.packed) pack_weights(p, own_packed.get<E>());
    const E* packed = p.packed ? static_cast<const E*>(p.packed) : own_packed.get<E>();

    // Tiles are worked on in blocks, as many for each thread. Small ones stay in the cache, large ones read the weights
    // less often; between about 2 MB and 36 tiles it is all the same.
    const int64_t largest = std::max<int64_t>(6 * kRows, (int64_t(9) << 16) / (kPositions * (depth + O)));
    const int64_t threads = std::min(p.num_threads, divide_up(tiles.count, kRows));
    const int64_t per_thread = divide_up(divide_up(tiles.count, threads), largest);
    const int64_t block = round_up(divide_up(tiles.count, threads * per_thread), kRows);
    const int64_t blocks = divide_up(tiles.count, block);
    // Strides that are no multiple of a page: caches put addresses a page apart into the same place.
    const int64_t v_stride = block * depth + kLanes, m_stride = block * O + kLanes;
    const std::vector<T> zeros(C, T{});
    std::atomic<int64_t> next{0};
    in_threads(std::min(threads, blocks), [&] {
        const Workspace workspace(kPositions * (v_stride + m_stride));
        E* v = workspace.get<E>();
        float* m = workspace.get<float>() + kPositions * v_stride;
        for (int64_t task; (task = next.fetch_add(1)) < blocks;) {
            const int64_t begin = task * block, count = std::min(block, tiles.count - begin);
            for (int64_t i = 0; i < count; ++i) 
                transform_input(p, tiles[begin + i], zeros.data(), v + i * depth, v_stride);
            for (int64_t position = 0; position < kPositions; ++position)
                for (int64_t o = 0; o < O; o += kPanel) {
                    const int64_t width = std::min(kPanel, O - o);
                    multiply<false>(width, count, depth, v + position * v_stride, depth,
                                    packed + (position * O + o) * depth, width, m + position * m_stride + o, O, false);
                }
            for (int64_t i = 0; i < count; ++i) transform_output<T>(p, tiles[begin + i], m + i * O, m_stride);
        }
    });
}

// dg = G^T u G for all weights; u is (36, C, C').
void finish_gradient(const Problem& p, const float* u) {
    const WeightTransform transform;
    const auto& g = transform.g;
    const int64_t C = p.in_channels, O = p.out_channels;
    std::atomic<int64_t> next{0};
    in_threads(std::min(p.num_threads, C), [&] {
        for (int64_t c; (c = next.fetch_add(1)) < C;)
            for (int64_t o = 0; o < O; o += kLanes) {
                Float16 t[3 * kIn] = {};
                for (int i = 0; i < kPositions; ++i) {
                    const Float16 value = load<Float16>(u + (i * C + c) * O + o);
                    for (int y = 0; y < 3; ++y) t[y * kIn + i % kIn] += g[i / kIn][y] * value;
                }
                for (int i = 0; i < 9; ++i) {
                    Float16 sum{};
                    for (int j = 0; j < kIn; ++j) sum += g[j][i % 3] * t[i / 3 * kIn + j];
                    store(p.weight_gradient + (i * C + c) * O + o, sum);
                }
            }
    });
}

// Maps of T, factors of E.
template <typename T, typename E> void gradient_of_weights(const Problem& p) {
    const Tiles tiles(p);
    const int64_t C = p.in_channels, O = p.out_channels;
    // Blocks of tiles, about 12 MB of them. Their size must not depend on the number of threads: sums would.
    const int64_t largest = std::max<int64_t>(48, (int64_t(3) << 20) * kTerms<E> / (kPositions * (C + O)));
    const int64_t block = round_up(std::min(tiles.count, largest), kTerms<E>), rows = block / kTerms<E>;
    const int64_t v_stride = rows * C + kLanes, m_stride = rows * O + kLanes;
    const Workspace workspace(kPositions * (v_stride + m_stride + C * O));
    E* v = workspace.get<E>();
    E* m = v + kPositions * v_stride;
    float* u = workspace.get<float>() + kPositions * (v_stride + m_stride);
    const std::vector<T> zeros(C, T{});
    for (int64_t begin = 0; begin < tiles.count; begin += block) {
        const int64_t count = divide_up(std::min(block, tiles.count - begin), kTerms<E>);
        std::atomic<int64_t> next{0};
        in_threads(std::min(p.num_threads, count), [&] {
            for (int64_t i; (i = next.fetch_add(1)) < count;)
                transform_both(p, tiles, begin + i * kTerms<E>, zeros.data(), v + i * C, v_stride, m + i * O, m_stride);
        });
        next = 0;
        constexpr int64_t part = 8 * kRows;  // of the input channels
        const int64_t parts = divide_up(C, part);
        in_threads(std::min(p.num_threads, kPositions * parts), [&] {
            for (int64_t task; (task = next.fetch_add(1)) < kPositions * parts;) {
                const int64_t position = task / parts, c = task % parts * part;
                for (int64_t o = 0; o < O; o += kPanel)
                    multiply<true>(std::min(kPanel, O - o), std::min(part, C - c), count, v + position * v_stride + c,
                                   C, m + position * m_stride + o, O, u + (position * C + c) * O + o, O, begin > 0);
            }
        });
    }
    finish_gradient(p, u);
}

}  // namespace

extern "C" {
// Whether it is worth while on this processor, for maps in bfloat16 if `bfloat16`: one that multiplies whole matrices
// of them (AMX) is faster without.
int64_t winograd_pays(int64_t bfloat16) {
#if (defined(__AVX2__) && defined(__FMA__)) || defined(__ARM_NEON)
#ifdef __AMX_BF16__
    return !bfloat16;
#else
    return (void)bfloat16, 1;
#endif
#else
    return (void)bfloat16, 0;
#endif
}
// Whether the processor multiplies bfloat16, so that `in_bfloat16` may be 1.
int64_t winograd_has_bfloat16(int64_t) { return kTerms<NarrowFactor> == 2; }

// Maps hold at least one number. winograd_pack writes to `output`.
int64_t winograd_pack(const Problem* p) {
    return guarded([&] {
        if (p->in_bfloat16)
            pack_weights(*p, static_cast<NarrowFactor*>(p->output));
        else
            pack_weights(*p, static_cast<float*>(p->output));
    });
}
int64_t winograd_convolve_float32(const Problem* p) { return guarded([&] { convolve<float, float>(*p); }); }
int64_t winograd_convolve_bfloat16(const Problem* p) {
    return guarded([&] { p->in_bfloat16 ? convolve<BFloat16, NarrowFactor>(*p) : convolve<BFloat16, float>(*p); });
}
int64_t winograd_weight_gradient_float32(const Problem* p) {
    return guarded([&] { gradient_of_weights<float, float>(*p); });
}
int64_t winograd_weight_gradient_bfloat16(const Problem* p) {
    return guarded([&] {
        p->in_bfloat16 ? gradient_of_weights<BFloat16, NarrowFactor>(*p) : gradient_of_weights<BFloat16, float>(*p);
    });
}
}

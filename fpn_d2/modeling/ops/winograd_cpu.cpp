// 3x3 convolution with stride 1 and padding 1 on channels-last maps, forward and backward, by minimal filtering
// F(4x4, 3x3) (Winograd 1980; Lavin and Gray, CVPR 2016, section 4): 36 products in place of 144 for each tile of 4 x 4
// outputs, behind a C interface that winograd.py calls.
//
//   forward     Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A     d: 6 x 6 inputs, g: 3 x 3 weights, Y: 4 x 4 outputs
//   weights     dg = G^T [ sum over tiles of (A dY A^T) * (B^T d B) ] G
//   input       the forward one, of dY with the weights turned round and in and out exchanged
//
// The products of one of the 36 positions, over all tiles and channels, are a matrix product. The points at which the
// polynomials are evaluated are 0, infinity, +-a and +-2a with a close to the square root of 1/2, where the rounding
// error is about 5 times that of the sum itself; with the usual 0, +-1, +-2 it is 10 to 15 times.
//
// Every number is summed in the same order whatever the number of threads. Compile with -ffp-contract=fast.

#include <algorithm>

#include "cpu_kernels.h"

extern "C" {
// Mirrored by ctypes in winograd.py. Sizes are counts, not bytes; C and C' are multiples of 16.
struct Problem {
    int64_t num_images, height, width, in_channels, out_channels, num_threads, relu;
    const void* input;          // (N, H, W, C)
    const float* packed;        // what winograd_pack wrote, or null: then from `weights`
    const float* weights;       // element (o, c, y, x) at o * strides[0] + c * strides[1] + ...
    const int64_t* strides;     // (4)
    const float* bias;          // (C') or null
    void* output;               // (N, H, W, C'); for the gradient of the weights, the gradient of the output
    float* weight_gradient;     // (3, 3, C, C')
};
}

namespace {

constexpr int kOut = 4, kIn = 6, kPositions = kIn * kIn, kLanes = 16;
// Registers hold kRows x kVectors vectors of sums.
constexpr int kRows = 6;
#ifdef __AVX512F__
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif
constexpr int64_t kPanel = kVectors * kLanes;  // output channels whose weights lie together

inline int64_t divide_up(int64_t n, int64_t k) { return (n + k - 1) / k; }
inline int64_t round_up(int64_t n, int64_t k) { return divide_up(n, k) * k; }

// ---- The three transforms in one dimension. `step` is the distance between elements.

constexpr double kA = 181.0 / 256, kB = 2 * kA;
constexpr float a1 = kA, a2 = kA * kA, a3 = kA * kA * kA, b1 = kB, b2 = kB * kB, b3 = kB * kB * kB;
constexpr float ab2 = kA * kB * kB, a2b = kA * kA * kB, a2b2 = kA * kA * kB * kB, sum2 = kA * kA + kB * kB;

inline void input_transform(const Float16* d, int step, Float16* v, int v_step) {  // B^T d
    const Float16 d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    const Float16 even_a = d4 - b2 * d2, odd_a = a1 * d3 - ab2 * d1;
    const Float16 even_b = d4 - a2 * d2, odd_b = b1 * d3 - a2b * d1;
    const Float16 first = a2b2 * d[0] - sum2 * d2 + d4, last = a2b2 * d1 - sum2 * d3 + d[5 * step];
    v[0] = first;
    v[v_step] = even_a + odd_a;
    v[2 * v_step] = even_a - odd_a;
    v[3 * v_step] = even_b + odd_b;
    v[4 * v_step] = even_b - odd_b;
    v[5 * v_step] = last;
}

inline void output_transform(const Float16* m, int step, Float16* y, int y_step) {  // A^T m
    const Float16 even_a = m[step] + m[2 * step], odd_a = m[step] - m[2 * step];
    const Float16 even_b = m[3 * step] + m[4 * step], odd_b = m[3 * step] - m[4 * step];
    y[0] = m[0] + even_a + even_b;
    y[y_step] = a1 * odd_a + b1 * odd_b;
    y[2 * y_step] = a2 * even_a + b2 * even_b;
    y[3 * y_step] = a3 * odd_a + b3 * odd_b + m[5 * step];
}

inline void gradient_transform(const Float16* y, int step, Float16* m, int m_step) {  // A dY
    const Float16 y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const Float16 even_a = y0 + a2 * y2, odd_a = a1 * y1 + a3 * y3;
    const Float16 even_b = y0 + b2 * y2, odd_b = b1 * y1 + b3 * y3;
    m[0] = y0;
    m[m_step] = even_a + odd_a;
    m[2 * m_step] = even_a - odd_a;
    m[3 * m_step] = even_b + odd_b;
    m[4 * m_step] = even_b - odd_b;
    m[5 * m_step] = y3;
}

struct WeightTransform {  // G
    float g[kIn][3];
    WeightTransform() {
        const double points[kIn - 1] = {0, kA, -kA, kB, -kB};
        for (int i = 0; i < kIn - 1; ++i) {
            double scale = 1;
            for (int j = 0; j < kIn - 1; ++j)
                if (j != i) scale *= points[i] - points[j];
            for (int j = 0; j < 3; ++j) g[i][j] = float((j == 0 ? 1 : j == 1 ? points[i] : points[i] * points[i]) / scale);
        }
        g[kIn - 1][0] = g[kIn - 1][1] = 0;
        g[kIn - 1][2] = 1;
    }
};

// ---- Tiles of a map, in two dimensions.

struct Tile {
    int64_t image, row, column;  // of its first output
};

struct Tiles {
    int64_t across, down, count;
    explicit Tiles(const Problem& p)
        : across(divide_up(p.width, kOut)), down(divide_up(p.height, kOut)), count(p.num_images * across * down) {}
    Tile operator[](int64_t i) const {
        return {i / (across * down), i / across % down * kOut, i % across * kOut};
    }
};

// v[position * stride + c] = (B^T d B)[position], d the inputs of the tile, zero outside the map.
template <typename T>
void transform_input(const Problem& p, const Tile& tile, const T* zeros, float* v, int64_t stride) {
    const T* map = static_cast<const T*>(p.input) + tile.image * p.height * p.width * p.in_channels;
    const T* from[kPositions];
    for (int64_t i = 0; i < kPositions; ++i) {
        const int64_t y = tile.row + i / kIn - 1, x = tile.column + i % kIn - 1;
        const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
        from[i] = inside ? map + (y * p.width + x) * p.in_channels : zeros;
    }
    for (int64_t c = 0; c < p.in_channels; c += kLanes) {
        Float16 d[kPositions], t[kPositions];
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) d[i] = load<Float16>(from[i] + c);
#pragma GCC unroll 36
        for (int j = 0; j < kIn; ++j) input_transform(d + j, kIn, t + j, kIn);
#pragma GCC unroll 36
        for (int i = 0; i < kIn; ++i) input_transform(t + i * kIn, 1, d + i * kIn, 1);
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) store(v + i * stride + c, d[i]);
    }
}

// The tile's outputs from m[position * stride + o]: A^T m A, the bias and the ReLU.
template <typename T> void transform_output(const Problem& p, const Tile& tile, const float* m, int64_t stride) {
    const int64_t rows = std::min<int64_t>(kOut, p.height - tile.row);
    const int64_t columns = std::min<int64_t>(kOut, p.width - tile.column);
    T* to = static_cast<T*>(p.output) +
            ((tile.image * p.height + tile.row) * p.width + tile.column) * p.out_channels;
    for (int64_t o = 0; o < p.out_channels; o += kLanes) {
        Float16 d[kPositions], t[kOut * kIn];
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) d[i] = load<Float16>(m + i * stride + o);
#pragma GCC unroll 36
        for (int j = 0; j < kIn; ++j) output_transform(d + j, kIn, t + j, kIn);
#pragma GCC unroll 36
        for (int i = 0; i < kOut; ++i) output_transform(t + i * kIn, 1, d + i * kIn, 1);
        const Float16 bias = p.bias ? load<Float16>(p.bias + o) : Float16{};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                Float16 y = d[i * kIn + j] + bias;
                if (p.relu) y = y < 0.0f ? Float16{} : y;  // a NaN stays one
                store(to + (i * p.width + j) * p.out_channels + o, y);
            }
    }
}

// m[position * stride + o] = (A dY A^T)[position], dY the gradient of the tile's outputs.
template <typename T> void transform_gradient(const Problem& p, const Tile& tile, float* m, int64_t stride) {
    const int64_t rows = std::min<int64_t>(kOut, p.height - tile.row);
    const int64_t columns = std::min<int64_t>(kOut, p.width - tile.column);
    const T* from = static_cast<const T*>(p.output) +
                    ((tile.image * p.height + tile.row) * p.width + tile.column) * p.out_channels;
    for (int64_t o = 0; o < p.out_channels; o += kLanes) {
        Float16 y[kOut * kOut] = {}, t[kIn * kOut], d[kPositions];
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                y[i * kOut + j] = load<Float16>(from + (i * p.width + j) * p.out_channels + o);
#pragma GCC unroll 36
        for (int j = 0; j < kOut; ++j) gradient_transform(y + j, kOut, t + j, kOut);
#pragma GCC unroll 36
        for (int i = 0; i < kIn; ++i) gradient_transform(t + i * kOut, 1, d + i * kIn, 1);
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) store(m + i * stride + o, d[i]);
    }
}

// ---- Matrix products.

// c(r, :) = [c(r, :) +] sum over k of x(r, k) * w(k, :), for R rows and the vectors of one panel, in registers.
// x(r, k) lies at x[r * x_step + k], or if Transposed at x[k * x_step + r].
template <int R, int V, bool Transposed>
void multiply_block(int64_t depth, const float* __restrict x, int64_t x_step, const float* __restrict w, int64_t w_step,
                    float* __restrict c, int64_t c_step, bool add) {
    Float16 sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[r][v] = add ? load<Float16>(c + r * c_step + v * kLanes) : Float16{};
    for (int64_t k = 0; k < depth; ++k) {
        Float16 row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) row[v] = load<Float16>(w + k * w_step + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float factor = Transposed ? x[k * x_step + r] : x[r * x_step + k];
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sums[r][v] += factor * row[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(c + r * c_step + v * kLanes, sums[r][v]);
}

template <int V, bool Transposed>
void multiply_panel(int64_t rows, int64_t depth, const float* x, int64_t x_step, const float* w, int64_t w_step,
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
template <bool Transposed>
void multiply(int64_t width, int64_t rows, int64_t depth, const float* x, int64_t x_step, const float* w,
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

// G g G^T of all weights as (36, panel, C, channels of the panel).
void pack_weights(const Problem& p, float* packed) {
    const WeightTransform transform;
    const auto& g = transform.g;
    const int64_t C = p.in_channels, O = p.out_channels, blocks_in = C / kLanes, blocks = blocks_in * (O / kLanes);
    std::atomic<int64_t> next{0};
    in_threads(std::min(p.num_threads, blocks), [&] {
        float weights[9][kLanes][kLanes];
        for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
            const int64_t c0 = block % blocks_in * kLanes, o0 = block / blocks_in * kLanes;
            for (int64_t o = 0; o < kLanes; ++o)
                for (int64_t i = 0; i < 9; ++i) {
                    const float* from = p.weights + (o0 + o) * p.strides[0] + c0 * p.strides[1] +
                                        i / 3 * p.strides[2] + i % 3 * p.strides[3];
                    for (int64_t c = 0; c < kLanes; ++c) weights[i][c][o] = from[c * p.strides[1]];
                }
            const int64_t panel = o0 / kPanel * kPanel, width = std::min(kPanel, O - panel);
            for (int64_t c = 0; c < kLanes; ++c) {
                Float16 w[9], t[kIn * 3];
                for (int i = 0; i < 9; ++i) w[i] = load<Float16>(weights[i][c]);
                for (int i = 0; i < kIn; ++i)
                    for (int x = 0; x < 3; ++x)
                        t[i * 3 + x] = g[i][0] * w[x] + g[i][1] * w[3 + x] + g[i][2] * w[6 + x];
                float* to = packed + panel * C + (c0 + c) * width + (o0 - panel);
                for (int i = 0; i < kIn; ++i)
                    for (int j = 0; j < kIn; ++j)
                        store(to + (i * kIn + j) * C * O,
                              g[j][0] * t[i * 3] + g[j][1] * t[i * 3 + 1] + g[j][2] * t[i * 3 + 2]);
            }
        }
    });
}

template <typename T> void convolve(const Problem& p) {
    const Tiles tiles(p);
    const int64_t C = p.in_channels, O = p.out_channels;
    Workspace own_packed(p.packed ? 0 : kPositions * C * O);
    if (!p.packed) pack_weights(p, own_packed.get());
    const float* packed = p.packed ? p.packed : own_packed.get();

    // Tiles are worked on in blocks, as many for each thread. Small ones stay in the cache, large ones read the weights
    // less often; between about 2 MB and 36 tiles it is all the same.
    const int64_t largest = std::max<int64_t>(6 * kRows, (int64_t(9) << 16) / (kPositions * (C + O)));
    const int64_t threads = std::min(p.num_threads, divide_up(tiles.count, kRows));
    const int64_t per_thread = divide_up(divide_up(tiles.count, threads), largest);
    const int64_t block = round_up(divide_up(tiles.count, threads * per_thread), kRows);
    const int64_t blocks = divide_up(tiles.count, block);
    // Strides that are no multiple of a page: caches put addresses a page apart into the same place.
    const int64_t v_stride = block * C + kLanes, m_stride = block * O + kLanes;
    const std::vector<T> zeros(C, T{});
    advise(p.output, p.num_images * p.height * p.width * O * sizeof(T));
    std::atomic<int64_t> next{0};
    in_threads(std::min(threads, blocks), [&] {
        const Workspace workspace(kPositions * (v_stride + m_stride));
        float* v = workspace.get();
        float* m = v + kPositions * v_stride;
        for (int64_t task; (task = next.fetch_add(1)) < blocks;) {
            const int64_t begin = task * block, count = std::min(block, tiles.count - begin);
            for (int64_t i = 0; i < count; ++i) transform_input(p, tiles[begin + i], zeros.data(), v + i * C, v_stride);
            for (int64_t position = 0; position < kPositions; ++position)
                for (int64_t o = 0; o < O; o += kPanel) {
                    const int64_t width = std::min(kPanel, O - o);
                    multiply<false>(width, count, C, v + position * v_stride, C, packed + position * C * O + o * C,
                                    width, m + position * m_stride + o, O, false);
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

template <typename T> void gradient_of_weights(const Problem& p) {
    const Tiles tiles(p);
    const int64_t C = p.in_channels, O = p.out_channels;
    // Blocks of tiles, about 12 MB of them. Their size must not depend on the number of threads: sums would.
    const int64_t largest = std::max<int64_t>(48, (int64_t(3) << 20) / (kPositions * (C + O)));
    const int64_t block = std::min(tiles.count, largest);
    const int64_t v_stride = block * C + kLanes, m_stride = block * O + kLanes;
    const Workspace workspace(kPositions * (v_stride + m_stride + C * O));
    float* v = workspace.get();
    float* m = v + kPositions * v_stride;
    float* u = m + kPositions * m_stride;
    const std::vector<T> zeros(C, T{});
    for (int64_t begin = 0; begin < tiles.count; begin += block) {
        const int64_t count = std::min(block, tiles.count - begin);
        std::atomic<int64_t> next{0};
        in_threads(std::min(p.num_threads, count), [&] {
            for (int64_t i; (i = next.fetch_add(1)) < count;) {
                transform_input(p, tiles[begin + i], zeros.data(), v + i * C, v_stride);
                transform_gradient<T>(p, tiles[begin + i], m + i * O, m_stride);
            }
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
// Whether this processor has vectors with which it is worth while.
int64_t winograd_pays() {
#if (defined(__AVX2__) && defined(__FMA__)) || defined(__ARM_NEON)
    return 1;
#else
    return 0;
#endif
}
// Each returns 0, or 1 where memory or threads ran out. Maps hold at least one number.
int64_t winograd_pack(const Problem* p, float* packed) { return guarded([&] { pack_weights(*p, packed); }); }
int64_t winograd_convolve_float32(const Problem* p) { return guarded([&] { convolve<float>(*p); }); }
int64_t winograd_convolve_bfloat16(const Problem* p) { return guarded([&] { convolve<BFloat16>(*p); }); }
int64_t winograd_weight_gradient_float32(const Problem* p) { return guarded([&] { gradient_of_weights<float>(*p); }); }
int64_t winograd_weight_gradient_bfloat16(const Problem* p) {
    return guarded([&] { gradient_of_weights<BFloat16>(*p); });
}
}

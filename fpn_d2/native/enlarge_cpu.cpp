// Enlarging of 8-bit images by linear interpolation, to the bits of Pillow's "bilinear", behind a C interface that
// enlarge.py calls.
//
// Pillow first stretches the rows and rounds to 8 bits, then the columns, with weights of 22 bits. Here a row of the
// image is stretched when the first row of the result needs it, and two such rows are kept: all of it stays in the
// cache. Compiles with g++ and clang++.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

extern "C" {
// Mirrored by ctypes in enlarge.py. Sizes are counts, strides bytes. Columns of the result come in blocks of as many as
// enlarge_lanes() says.
struct Problem {
    int64_t height, width, channels, row_stride, column_stride, channel_stride;  // of the image
    int64_t new_height, new_width, plane_stride;                                 // of the result, (channels, H, W)
    const uint8_t* image;
    uint8_t* result;
    const int32_t* starts;        // (blocks): the column of the image at which a block starts
    const uint8_t* offsets;       // (blocks, 16): from there to the first column of each
    const int32_t* weights;       // (2, blocks, lanes): of that column, and of the next
    const int32_t* rows;          // (H): the first row of the image for each row of the result
    const int32_t* row_weights;   // (2, H)
};
}

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
constexpr int64_t kBytes = 16;
constexpr int kBits = 22;
typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint8_t Lanes __attribute__((vector_size(kLanes)));  // the lower part of Bytes, or all of it
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <typename V> inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

// from[offsets], and zero for offsets of 128 or more.
inline Bytes pick(Bytes from, Bytes offsets) {
#if defined(__SSSE3__)
    return Bytes(_mm_shuffle_epi8(__m128i(from), __m128i(offsets)));
#elif defined(__aarch64__)
    return Bytes(vqtbl1q_u8(uint8x16_t(from), uint8x16_t(offsets)));
#else
    Bytes to;
    for (int i = 0; i < kBytes; ++i) to[i] = offsets[i] < kBytes ? from[offsets[i]] : 0;
    return to;
#endif
}

// To 32 bits and back; g++ makes a step for each byte of it.
inline Ints widen(Bytes a) {
#if defined(__AVX512F__)
    return Ints(_mm512_cvtepu8_epi32(__m128i(a)));
#elif defined(__AVX2__)
    return Ints(_mm256_cvtepu8_epi32(__m128i(a)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Lanes>(&a), Shorts), Ints);
#endif
}

inline Lanes narrow(Ints a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(__m256i(a), __m256i(a)), 0x08);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_castsi256_si128(words));
    return load<Lanes>(&bytes);
#else
    return __builtin_convertvector(a, Lanes);
#endif
}

inline Ints mix(Ints a, Ints of_a, Ints b, Ints of_b) {
    return (a * of_a + b * of_b + (1 << (kBits - 1))) >> kBits;
}

// Which bytes of the three vectors that 16 pixels of 3 channels take are of channel k.
struct ChannelBytes {
    Bytes of[3][3];  // [k][vector]
    ChannelBytes() {
        for (int k = 0; k < 3; ++k)
            for (int vector = 0; vector < 3; ++vector)
                for (int i = 0; i < kBytes; ++i) {
                    const int place = 3 * i + k - vector * kBytes;
                    of[k][vector][i] = place >= 0 && place < kBytes ? place : 128;
                }
    }
};

// Row `y` of the image as channels of `step` bytes.
void part(const Problem& p, int64_t y, uint8_t* to, int64_t step) {
    static const ChannelBytes bytes;
    const uint8_t* from = p.image + y * p.row_stride;
    int64_t x = 0;
    if (p.channels == 3 && p.column_stride == 3 && p.channel_stride == 1)
        for (; x + kBytes <= p.width; x += kBytes) {
            const uint8_t* at = from + 3 * x;
            const Bytes a = load<Bytes>(at), b = load<Bytes>(at + kBytes), c = load<Bytes>(at + 2 * kBytes);
            for (int64_t k = 0; k < 3; ++k) {
                const Bytes found = pick(a, bytes.of[k][0]) | pick(b, bytes.of[k][1]) | pick(c, bytes.of[k][2]);
                std::memcpy(to + k * step + x, &found, kBytes);
            }
        }
    for (; x < p.width; ++x)
        for (int64_t k = 0; k < p.channels; ++k) to[k * step + x] = from[x * p.column_stride + k * p.channel_stride];
}

void enlarge(const Problem& p) {
    const int64_t blocks = (p.new_width + kLanes - 1) / kLanes;
    const int64_t step = p.width + 2 * kBytes;  // a block may read past the row's end, with weights of zero
    std::vector<uint8_t> parts(p.channels * step);
    std::vector<Ints> kept(2 * p.channels * blocks);
    int64_t ready = -1;  // the last row that was stretched
    for (int64_t y = 0; y < p.new_height; ++y) {
        const int64_t first = p.rows[y], last = first + (p.row_weights[p.new_height + y] != 0);
        for (ready = ready < first ? first - 1 : ready; ready < last;) {
            ++ready;
            part(p, ready, parts.data(), step);
            Ints* to = kept.data() + ready % 2 * p.channels * blocks;
            for (int64_t i = 0; i < blocks; ++i) {
                const Bytes offsets = load<Bytes>(p.offsets + i * kBytes);
                const Ints a = load<Ints>(p.weights + i * kLanes), b = load<Ints>(p.weights + (blocks + i) * kLanes);
                for (int64_t k = 0; k < p.channels; ++k) {
                    const uint8_t* from = parts.data() + k * step + p.starts[i];
                    const Bytes left = pick(load<Bytes>(from), offsets), right = pick(load<Bytes>(from + 1), offsets);
                    to[k * blocks + i] = mix(widen(left), a, widen(right), b);
                }
            }
        }
        const Ints a = Ints{} + p.row_weights[y], b = Ints{} + p.row_weights[p.new_height + y];
        for (int64_t k = 0; k < p.channels; ++k) {
            const Ints* upper = kept.data() + (first % 2 * p.channels + k) * blocks;
            const Ints* lower = kept.data() + (last % 2 * p.channels + k) * blocks;
            uint8_t* to = p.result + k * p.plane_stride + y * p.new_width;
            for (int64_t i = 0; i < blocks; ++i) {
                const Lanes mixed = narrow(mix(upper[i], a, lower[i], b));
                if (i + 1 < blocks)
                    std::memcpy(to + i * kLanes, &mixed, kLanes);
                else
                    std::memcpy(to + i * kLanes, &mixed, p.new_width - i * kLanes);
            }
        }
    }
}

}  // namespace

extern "C" {
// The columns of a block; 0 where this processor's vectors are too short for it to be worth while.
int64_t enlarge_lanes(int64_t) {
#if defined(__AVX2__) || defined(__aarch64__)
    return kLanes;
#else
    return 0;
#endif
}

// Returns 0, or -1 where memory ran out.
int64_t enlarge_image(const Problem* p) {
    try {
        enlarge(*p);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}
}

// What the compiled operations share: vectors of channels, bfloat16, threads and memory.
// C++17 with GCC's vector extensions (g++, clang++) and no headers of torch; op.py loads.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstddef>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
typedef uint32_t Bits16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};

template <typename V, typename T> inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
template <> inline float load<float, BFloat16>(const BFloat16* from) {
    const uint32_t bits = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
template <> inline Float16 load<Float16, BFloat16>(const BFloat16* from) {
    Half16 half;
    std::memcpy(&half, from, sizeof(half));
    const Bits16 bits = __builtin_convertvector(half, Bits16) << 16;
    Float16 v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
}
template <typename T, typename V> inline void store(T* to, V v) { std::memcpy(to, &v, sizeof(V)); }

inline float narrow(float value, float*) { return value; }
inline double narrow(double value, double*) { return value; }
inline BFloat16 narrow(float value, BFloat16*) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{uint16_t(nan ? 0x7fc0u : rounded)};
}
// The same for a vector.
template <> inline void store<BFloat16, Float16>(BFloat16* to, Float16 v) {
#ifdef __AVX512BF16__
    const __m256bh half = _mm512_cvtneps_pbh(__m512(v));
#else
    Bits16 bits;
    std::memcpy(&bits, &v, sizeof(v));
    const Bits16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits16 nan = Bits16((bits & 0x7fffffffu) > 0x7f800000u);
    const Half16 half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Half16);
#endif
    std::memcpy(to, &half, sizeof(half));
}

// Ask for large pages for memory that is about to be written for the first time: in pages of 4 KiB, being given the
// memory of a result of 50 MB takes about half as long as computing it. Only a hint; nothing depends on it.
inline void advise(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t(1) << 21;
    const uintptr_t begin = (uintptr_t(memory) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(memory) + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// How an OpenMP runtime starts a parallel region: GOMP_parallel, which those of GCC, LLVM and Intel have.
typedef void (*Parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
inline Parallel& openmp() {
    static Parallel found = nullptr;
    return found;
}

// Call work() in `count` threads and wait for all; the first exception of any is thrown here.
//
// The threads are those of the process' OpenMP runtime, if op.py found one. Its threads keep a core busy for some
// milliseconds after each of torch's operations, waiting for the next: others would wait for them.
template <typename Work> void in_threads(int64_t count, const Work& work) {
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    auto run = [&] {
        try {
            work();
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    };
    if (count > 1 && openmp()) {
        openmp()([](void* data) { (*static_cast<decltype(run)*>(data))(); }, &run, unsigned(count), 0);
    } else {
        std::vector<std::thread> threads;
        for (int64_t i = 1; i < count; ++i) {
            try {
                threads.emplace_back(run);
            } catch (...) {
                break;  // no thread to be had: those that run share out all of the work
            }
        }
        run();
        for (auto& thread : threads) thread.join();
    }
    if (failed) std::rethrow_exception(error);
}

// Memory for intermediate results, kept for the next call: to be given fresh memory costs more than what is done with it.
class Workspace {
  public:
    explicit Workspace(int64_t floats) {
        std::lock_guard<std::mutex> lock(mutex());
        std::vector<Block>& idle = idle_blocks();
        size_t best = idle.size();  // the smallest that is large enough
        for (size_t i = 0; i < idle.size(); ++i)
            if (idle[i].floats >= floats && (best == idle.size() || idle[i].floats < idle[best].floats)) best = i;
        if (best < idle.size()) {
            block_ = idle[best];
        } else {
            if (!idle.empty()) {  // too small, as all of them are
                best = idle.size() - 1;
                ::operator delete(idle[best].memory, kPage);
            }
            const int64_t page = int64_t(kPage), bytes = (floats * 4 + page - 1) / page * page;
            void* memory = ::operator new(bytes, kPage, std::nothrow);
            if (memory) advise(memory, bytes);
            block_ = {static_cast<float*>(memory), bytes / 4};
        }
        if (best < idle.size()) idle.erase(idle.begin() + best);
        if (!block_.memory) throw std::bad_alloc();
    }
    ~Workspace() {
        std::lock_guard<std::mutex> lock(mutex());
        idle_blocks().push_back(block_);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    template <typename E = float> E* get() const { return reinterpret_cast<E*>(block_.memory); }

  private:
    static constexpr std::align_val_t kPage{size_t(2) << 20};
    struct Block {
        float* memory;
        int64_t floats;
    };
    static std::mutex& mutex() {
        static std::mutex* one = new std::mutex;
        return *one;
    }
    static std::vector<Block>& idle_blocks() {
        static std::vector<Block>* all = new std::vector<Block>;  // never destroyed: threads may outlive main()
        return *all;
    }
    Block block_;
};

// What a function returns: 0, or -1 where memory or threads ran out.
template <typename Call> int64_t guarded(const Call& call) {
    try {
        call();
        return 0;
    } catch (...) {
        return -1;
    }
}

}  // namespace

extern "C" void use_openmp(Parallel parallel) { openmp() = parallel; }

// How the kernels share work out to threads: units are handed out one by one, so a slow unit holds nobody up, and write
// disjoint memory, so that which thread does which does not show in the result. A failed allocation is thrown in the thread
// that called, whoever met it; at the end of an entry point it is a number, since no exception may cross into Python.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

// The end of an entry point, which begins with `try {` and returns int64_t.
#define CATCH_OUT_OF_MEMORY \
    catch (const std::bad_alloc&) { return OUT_OF_MEMORY; }

namespace {

constexpr int64_t OUT_OF_MEMORY = INT64_MIN;

// make()(unit) for every unit; each thread makes one worker, which may own buffers. The caller is one of the threads.
template <class Make>
void parallel_workers(int64_t units, int64_t threads, Make make) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto loop = [&] {
        try {
            auto work = make();
            for (int64_t unit; (unit = next.fetch_add(1)) < units;) work(unit);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> pool;
    try {
        for (int64_t i = 1; i < std::min(threads, units); ++i) pool.emplace_back(loop);
    } catch (const std::exception&) {  // no more threads here: those that there are do all of it
    }
    loop();
    for (auto& thread : pool) thread.join();
    if (failed) throw std::bad_alloc();
}

// work(unit) for every unit.
template <class Work>
void parallel(int64_t units, int64_t threads, Work work) {
    parallel_workers(units, threads, [&] { return [&](int64_t unit) { work(unit); }; });
}

}  // namespace

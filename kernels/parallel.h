// How the kernels share work out to threads: units are handed out one by one, so a slow unit holds nobody up, and write
// disjoint memory, so that which thread does which does not show in the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// make()(unit) for every unit; each thread makes one worker, which may own buffers. The caller is one of the threads.
template <class Make>
void parallel_workers(int64_t units, int64_t threads, Make make) {
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        auto work = make();
        for (int64_t unit; (unit = next.fetch_add(1)) < units;) work(unit);
    };
    std::vector<std::thread> pool;
    for (int64_t i = 1; i < std::min(threads, units); ++i) {
        try {
            pool.emplace_back(loop);
        } catch (const std::system_error&) {
            break;  // no more threads here: those that there are do all of it
        }
    }
    loop();
    for (auto& thread : pool) thread.join();
}

// work(unit) for every unit.
template <class Work>
void parallel(int64_t units, int64_t threads, Work work) {
    parallel_workers(units, threads, [&] { return [&](int64_t unit) { work(unit); }; });
}

}  // namespace

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace bitwright {

/// How many threads `parallel_for` uses, the caller's included. Default: all cores. Set before work starts.
void set_thread_count(size_t count);
size_t thread_count();

/// Calls body(0) … body(count - 1), each once, on all threads, and returns when all are done. Which thread runs which
/// index is left open, so what an index computes must depend on nothing but the index: then results are the same for
/// every thread count. The first exception is rethrown here. A call from inside a body runs on that thread alone.
void parallel_for(size_t count, const std::function<void(size_t)>& body);

/// Splits [0, total) into pieces of `grain` (the last may be shorter) and calls body(begin, end) for each.
/// The pieces do not depend on the number of threads.
void parallel_ranges(size_t total, size_t grain, const std::function<void(size_t, size_t)>& body);

/// `total` bytes that fill(begin, end, all) writes for each piece, all being the first byte of all. A vector clears its
/// bytes; on one thread that is done piece by piece, while the cache holds them. A piece may touch no byte of others.
std::vector<std::byte> parallel_bytes(size_t total, size_t grain,
                                      const std::function<void(size_t begin, size_t end, std::byte* all)>& fill);

/// parallel_for for work that takes memory: indices start in order, and one waits until its weight and those in work
/// fit `budget` (one alone always runs). The first exception ends it and is rethrown.
void parallel_within(size_t count, uint64_t budget, const std::function<uint64_t(size_t)>& weight,
                     const std::function<void(size_t)>& body);

/// Ctrl-C, SIGTERM and SIGHUP set a flag; long loops call this and unwind with Error (exit status 130), so that outputs
/// are removed or can be resumed.
void install_interrupt_handler();
void throw_if_interrupted();
/// Was there an interruption? It counts as heeded from now on: whoever asks ends the work, and may still write.
bool take_interruption();

}  // namespace bitwright

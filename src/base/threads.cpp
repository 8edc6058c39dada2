#include "base/threads.hpp"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "base/error.hpp"

namespace bitwright {
namespace {

std::atomic<size_t> g_thread_count{0};
std::atomic<int> g_interrupted{0};
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler sets it");
thread_local bool t_inside_parallel = false;

/// Sleeping workers, woken for each parallel_for. Decoding one token makes a hundred short calls, so waiting starts
/// with a short spin.
class Pool {
 public:
  explicit Pool(size_t workers) {
    try {
      for (size_t i = 0; i < workers; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // the system gives no more: those that started do
    }
  }
  ~Pool() {
    stop_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  void run(size_t count, const std::function<void(size_t)>& body) {
    body_ = &body;
    count_ = count;
    next_ = 0;
    error_ = nullptr;
    running_ = threads_.size();
    epoch_.fetch_add(1);
    epoch_.notify_all();
    take();
    for (size_t left = running_.load(); left != 0; left = running_.load()) running_.wait(left);
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr int kSpins = 2000;

  void take() {
    t_inside_parallel = true;
    try {
      for (size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) (*body_)(i);
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
    t_inside_parallel = false;
  }

  void work() {
    for (size_t seen = 0;;) {
      for (int i = 0; i < kSpins && epoch_.load() == seen; ++i) std::this_thread::yield();
      epoch_.wait(seen);
      ++seen;
      if (stop_) return;
      take();
      if (running_.fetch_sub(1) == 1) running_.notify_all();
    }
  }

  std::vector<std::thread> threads_;
  std::atomic<size_t> epoch_{0}, next_{0}, running_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(size_t)>* body_ = nullptr;
  size_t count_ = 0;
  std::exception_ptr error_;
  std::mutex error_mutex_;
};

Pool& pool() {
  static Pool instance(thread_count() - 1);
  return instance;
}

/// Would parallel_for use this thread alone?
bool runs_alone() { return t_inside_parallel || thread_count() == 1; }

extern "C" void on_signal(int) { g_interrupted = 1; }

}  // namespace

void set_thread_count(size_t count) { g_thread_count = std::max<size_t>(count, 1); }

size_t thread_count() {
  const size_t count = g_thread_count;
  if (count != 0) return count;
  cpu_set_t allowed;  // not all cores may be ours: taskset, containers, Slurm
  if (::sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    return static_cast<size_t>(std::max(1, CPU_COUNT(&allowed)));
  return std::max(1u, std::thread::hardware_concurrency());
}

void parallel_for(size_t count, const std::function<void(size_t)>& body) {
  if (count <= 1 || runs_alone()) {
    for (size_t i = 0; i < count; ++i) body(i);
    return;
  }
  static std::mutex one_caller;  // the pool serves one parallel_for at a time
  const std::lock_guard lock(one_caller);
  pool().run(count, body);
}

std::vector<std::byte> parallel_bytes(size_t total, size_t grain,
                                      const std::function<void(size_t begin, size_t end, std::byte* all)>& fill) {
  BW_ASSERT(grain > 0);
  std::vector<std::byte> bytes;
  if (!runs_alone()) {
    bytes.resize(total);
    parallel_ranges(total, grain, [&](size_t begin, size_t end) { fill(begin, end, bytes.data()); });
    return bytes;
  }
  bytes.reserve(total);
  for (size_t begin = 0; begin < total; begin = bytes.size()) {
    bytes.resize(begin + std::min(grain, total - begin));
    fill(begin, bytes.size(), bytes.data());
  }
  return bytes;
}

void parallel_ranges(size_t total, size_t grain, const std::function<void(size_t, size_t)>& body) {
  BW_ASSERT(grain > 0);
  parallel_for((total + grain - 1) / grain, [&](size_t i) { body(i * grain, std::min(total, (i + 1) * grain)); });
}

void parallel_within(size_t count, uint64_t budget, const std::function<uint64_t(size_t)>& weight,
                     const std::function<void(size_t)>& body) {
  std::mutex mutex;
  std::condition_variable freed;
  size_t next = 0;
  uint64_t used = 0;
  const auto fits = [&] { return next >= count || used == 0 || weight(next) <= budget - std::min(budget, used); };
  parallel_for(std::min(thread_count(), count), [&](size_t) {
    for (std::unique_lock lock(mutex);;) {
      freed.wait(lock, fits);
      if (next >= count) return;
      const size_t i = next++;
      used += weight(i);
      lock.unlock();
      try {
        body(i);
      } catch (...) {
        lock.lock();
        next = count;
        freed.notify_all();
        throw;
      }
      lock.lock();
      used -= weight(i);
      freed.notify_all();
    }
  });
}

void install_interrupt_handler() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // a second Ctrl-C ends the process at once
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction before = {};
    if (sigaction(signal, nullptr, &before) == 0 && before.sa_handler == SIG_IGN) continue;  // nohup's wish
    sigaction(signal, &action, nullptr);
  }
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit is reported by write(), not by death
}

bool take_interruption() {
  if (g_interrupted == 0) return false;
  g_interrupted = 0;
  return true;
}

void throw_if_interrupted() {
  if (g_interrupted != 0)
    throw Error({.code = "interrupted", .what = "interrupted", .status = ExitStatus::interrupted, .resumable = true});
}

}  // namespace bitwright

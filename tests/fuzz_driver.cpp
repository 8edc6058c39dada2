// Runs a fuzz target without libFuzzer: each file of the corpus as it is, then mutations of it. The same every time.
//   NAME_fuzz CORPUS_DIRECTORY | FILE

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/support.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr int kMutations = 2000;  // of each file
constexpr unsigned kSecondsPerInput = 20;
constexpr size_t kLargestInput = size_t{1} << 20;

/// The input being tried, in memory shared with the process that tries it, so that it outlives a crash.
struct Shared {
  size_t size;
  uint8_t bytes[kLargestInput];
};

std::string mutated(const std::string& original, const std::string& other, std::mt19937& random) {
  const auto below = [&](size_t n) { return n == 0 ? 0 : random() % n; };
  std::string bytes = original;
  for (size_t changes = 1 + below(4); changes > 0; --changes) {
    const size_t at = below(bytes.size());
    if (bytes.empty()) bytes = other;
    if (bytes.empty()) return std::string(1, static_cast<char>(random()));
    switch (below(6)) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:
        bytes[at] = static_cast<char>(random());
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.erase(at, 1 + below(8));
        break;
      case 4:
        bytes.insert(at, bytes, below(bytes.size()), 1 + below(16));
        break;
      case 5:
        bytes = bytes.substr(0, at) + other.substr(std::min(other.size(), below(other.size() + 1)));
        break;
    }
  }
  return bytes.substr(0, kLargestInput);
}

void try_input(Shared& shared, const std::string& bytes) {
  shared.size = bytes.size();
  std::memcpy(shared.bytes, bytes.data(), bytes.size());
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());  // on the heap: reading past its end is seen
  alarm(kSecondsPerInput);
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
  alarm(0);
}

int try_all(Shared& shared, const std::vector<std::string>& corpus) {
  std::mt19937 random(1);
  for (const std::string& bytes : corpus) {
    try_input(shared, bytes);
    for (int i = 0; i < kMutations; ++i) try_input(shared, mutated(bytes, corpus[random() % corpus.size()], random));
  }
  std::printf("cases: %zu\n", corpus.size() * (kMutations + 1));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s CORPUS_DIRECTORY | FILE\n", argv[0]), 2;
  if (std::filesystem::is_regular_file(argv[1])) {  // reproduces a failure, in this process for a debugger
    const std::string bytes = bitwright::test::read_file(argv[1]);
    return LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  std::vector<std::string> corpus;
  for (const auto& file : bitwright::test::files_in(argv[1])) {
    corpus.push_back(bitwright::test::read_file(file).substr(0, kLargestInput));
  }
  if (corpus.empty()) return std::fprintf(stderr, "%s: no corpus in %s\n", argv[0], argv[1]), 2;

  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return std::perror("mmap"), 1;
  Shared& shared = *static_cast<Shared*>(memory);
  const pid_t child = fork();
  if (child < 0) return std::perror("fork"), 1;
  if (child == 0) return try_all(shared, corpus);
  int status = 0;
  waitpid(child, &status, 0);
  if (status == 0) return 0;
  const std::string name = std::filesystem::path(argv[0]).filename().string() + ".failed";
  bitwright::test::write_file(name, {reinterpret_cast<const char*>(shared.bytes), shared.size});
  std::fprintf(stderr, "failed (wait status %d); reproduce with: %s %s\n", status, argv[0], name.c_str());
  return 1;
}

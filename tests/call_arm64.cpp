// Calls one C function of a kernel with operands from standard input, for tests/arm64.py: the process that qemu emulates.
//   call_arm64 LIBRARY FUNCTION
// In: the number of operands, then each one's bytes (-1: a number, which follows) and content. Out: the function's result,
// then the content of all that were memory, changed or not. All numbers are int64.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

int64_t read_number() {
  int64_t x = 0;
  return std::fread(&x, sizeof x, 1, stdin) == 1 ? x : 0;
}

}  // namespace

int main(int, char** words) {
  void* library = dlopen(words[1], RTLD_NOW);
  void* function = library ? dlsym(library, words[2]) : nullptr;
  if (!function) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  constexpr int64_t kMost = 20;
  int64_t a[kMost] = {};  // numbers and addresses are passed alike, and what a function does not take is not looked at
  const size_t count = size_t(read_number());
  if (count > kMost) return std::fprintf(stderr, "at most %d operands\n", int(kMost)), 1;
  std::vector<std::vector<char>> memory(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t bytes = read_number();
    if (bytes < 0) {
      a[i] = read_number();
      continue;
    }
    memory[i].resize(size_t(bytes) + 1);  // an address, even of nothing
    if (bytes && std::fread(memory[i].data(), size_t(bytes), 1, stdin) != 1) return 1;
    a[i] = reinterpret_cast<int64_t>(memory[i].data());
  }
  using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                               int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
  const int64_t result = reinterpret_cast<Function>(function)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9],
                                                              a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19]);
  std::fwrite(&result, sizeof result, 1, stdout);
  for (const auto& content : memory)
    if (!content.empty()) std::fwrite(content.data(), content.size() - 1, 1, stdout);
  return 0;
}

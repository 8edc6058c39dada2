#pragma once

/// Before a function whose loop the compiler turns into vectors: compiled for several instruction sets, the best of
/// which is chosen when the program starts. The result is the same in each, as no sum is reordered and nothing fused.
/// ThreadSanitizer cannot run the choice, which is made before it starts.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#define BITWRIGHT_VECTORIZED __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define BITWRIGHT_VECTORIZED
#endif

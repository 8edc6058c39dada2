#include "algorithm/rtn.hpp"

namespace bitwright {

extern const Algorithm imatrix_algorithm;
const Algorithm imatrix_algorithm = {
    .name = "imatrix",
    .summary = "as rtn, with errors weighted by how large each column's inputs are (`bitwright calibrate`); for gguf",
    .source = "llama.cpp (b8000), tools/imatrix, and ggml's quantize_* with weights",
    .quantize = nearest_codes,
    .weighted = true};

}  // namespace bitwright

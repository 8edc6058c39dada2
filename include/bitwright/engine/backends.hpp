#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "bitwright/engine/plan.hpp"
#include "bitwright/json.hpp"

namespace bitwright {

/// SPECIFICATION D: the libraries' own schemes under one name each, and where each library runs them.
struct AdapterMethod {
  std::string_view name;  ///< "bnb_nf4"
  std::string_view library;
  std::string_view container;  ///< as in `bitwright formats`; empty: its checkpoints are not read
  int bits;                    ///< 0: the configuration says
  double bytes_per_parameter;  ///< without scales: 2, 1, 0.5, 0.25
};
std::vector<AdapterMethod> adapter_methods();

/// Does `backend` ("cuda", "mps", "mlx", "cpu") run `method` in its library? Bitwright's own kernels run all on CPU.
bool backend_runs(std::string_view backend, std::string_view method, const Facts& facts = Facts::standard());

/// Everything that speaks against a configuration, its form included (D1: method, bits, group_size, compute_dtype,
/// quant_type ...) on a backend; an error says what to fall back to. Throws Error for a backend or a method nobody
/// knows.
std::vector<Diagnostic> validate_quantization_config(const OrderedJson& config, std::string_view backend,
                                                     const Facts& facts = Facts::standard());

/// D4: the least quantization that fits. `model_size_b`: parameters in billions. The configuration: method, bits,
/// group_size, compute_dtype.
OrderedJson get_recommended_config(std::string_view backend, double model_size_b, double available_memory_gb,
                                   const Facts& facts = Facts::standard());

/// Bytes of the weights with a method, the scales of its groups included (D5).
double adapter_bytes(std::string_view method, double parameters, int bits = 4, int group_size = 64,
                     bool double_quant = true);

/// A row for each method: whether this build reads and writes its checkpoints (`usable`, `why` not, `reads`, `writes`),
/// and on which backends its library runs it (`backends`: usable, why not).
OrderedJson report_import_status(const Facts& facts = Facts::standard());

}  // namespace bitwright

#pragma once

/// Everything that a program which links Bitwright::torch may use beside bitwright.hpp: quantization and training of
/// any torch::nn::Module. What the user can cause is thrown as bitwright::Error.

#include "bitwright/bitwright.hpp"
#include "bitwright/torch/adapter.hpp"
#include "bitwright/torch/finetuning.hpp"
#include "bitwright/torch/lora.hpp"
#include "bitwright/torch/ptq.hpp"
#include "bitwright/torch/qat.hpp"
#include "bitwright/torch/quantization_config.hpp"
#include "bitwright/torch/trainer.hpp"
#include "bitwright/torch/training_config.hpp"

#include "cli/command.hpp"
#include "cli/train.hpp"
#include "train/training_run.hpp"

namespace {

bitwright::OrderedJson train(const bitwright::TrainingRequest& request, std::vector<bitwright::Warning>& warnings) {
  return bitwright::train::run_training(
      {.config = request.config, .set = request.set, .resume = request.resume, .force = request.force}, warnings);
}

}  // namespace

int main(int argc, char** argv) {
  bitwright::set_training(train);
  return bitwright::run_command_line(argc, argv);
}

#include "engine/loads.hpp"

namespace bitwright {

bool refuses(const Diagnostic& said) { return said.severity == Severity::error || said.code == "UNSUPPORTED_CKPT"; }

std::vector<Loads> engines_that_load(const ModelDocuments& documents, const Facts& facts) {
  const DetectedQuantization found = detect_model_quantization(documents);
  const auto config = documents.find("config.json");
  Json model = config == documents.end() ? Json::object() : model_facts(config->second);
  model.update(found.facts);
  std::vector<Loads> answers;
  for (const Json* engine : facts.all("engines")) {
    PlanRequest request = {.engine = (*engine)["name"].get<std::string>(), .checkpoint = found.method, .model = model};
    const EnginePlan plan = plan_engine(request, facts);
    Loads answer = {.engine = request.engine, .yes = true};
    for (const Diagnostic& said : plan.diagnostics) {
      if (said.severity != Severity::note && (answer.reason.empty() || (refuses(said) && answer.yes)))
        answer.reason = said.message;
      answer.yes = answer.yes && !refuses(said);
    }
    answers.push_back(std::move(answer));
  }
  return answers;
}

}  // namespace bitwright

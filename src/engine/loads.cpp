#include "engine/loads.hpp"

namespace bitwright {

bool refuses(const Diagnostic& said) { return said.severity == Severity::error || said.code == "UNSUPPORTED_CKPT"; }

Loads answer_of(PlanRequest request, const ModelDocuments& documents, const Facts& facts) {
  const DetectedQuantization found = detect_model_quantization(documents);
  const auto config = documents.find("config.json");
  request.checkpoint = found.method;
  request.model = config == documents.end() ? Json::object() : model_facts(config->second);
  request.model.update(found.facts);
  Loads answer = {.engine = request.engine, .yes = true};
  for (const Diagnostic& said : plan_engine(request, facts).diagnostics) {
    if (said.severity != Severity::note && (answer.reason.empty() || (refuses(said) && answer.yes)))
      answer.reason = said.message;
    answer.yes = answer.yes && !refuses(said);
  }
  return answer;
}

std::vector<Loads> engines_that_load(const ModelDocuments& documents, const Facts& facts) {
  std::vector<Loads> answers;
  for (const Json* engine : facts.all("engines"))
    answers.push_back(answer_of({.engine = (*engine)["name"].get<std::string>()}, documents, facts));
  return answers;
}

}  // namespace bitwright

#!/usr/bin/env python3
"""GGUF against a real llama.cpp, in both directions; a table of what was found. Not part of the build or of CI.

    llamacpp.py HEADERS LIBRARIES [--build DIR] [--work DIR] [--only NAME] [--types A,B]

HEADERS: folders with llama.h and ggml.h, a colon between them. LIBRARIES: the folder of libllama, libggml and the
backends (npm's node-llama-cpp has them ready made). Needs numpy, a built Bitwright (--build, default build/release) and
the shared data for models that were trained; the others are random, from tools/reference.

For each model and file type: what `quantize --format gguf` writes is run by llama.cpp ("ours"), what llama.cpp's own
quantizer makes of our f32 or f16 file is run here ("theirs"), and both must give each tensor the same type. Each file
is compared as it is, where llama.cpp rounds activations (to f16, bf16 or 8 bits, as the weights' type has it), and once
more after llama.cpp itself has turned it into f32: then nothing is rounded and logits must be equal.
"""
import argparse
import glob
import importlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tools", "reference"))
sys.dont_write_bytecode = True
import numpy  # noqa: E402
from tiny import encode, write_safetensors  # noqa: E402

SHARED = os.environ.get("BITWRIGHT_SHARED", os.path.join(ROOT, "..", "shared"))
TEXT = os.path.join(ROOT, "examples", "tinystories-4m", "tinystories_valid.txt")
EXAMPLE = os.path.join(ROOT, "examples", "tinystories-4m")

# By the number that llama.cpp has for them; None: its quantizer does not write them.
TYPES = {"none": None, "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10,
         "q2_k_s": None, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
         "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38, "nvfp4": None,
         "iq2_xxs": None, "iq2_xs": None, "iq2_s": None, "iq2_m": None, "iq3_xxs": None, "iq3_xs": None, "iq3_s": 26,
         "iq3_m": 27}

LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
NARROW = {"hidden_size": 160, "intermediate_size": 288, "num_attention_heads": 5, "num_key_value_heads": 1}
ODD = {"hidden_size": 72, "intermediate_size": 120, "num_attention_heads": 3, "num_key_value_heads": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}
LONG = {"type": "longrope", "short_factor": [1 + i / 20 for i in range(16)],
        "long_factor": [1 + i / 4 for i in range(16)]}

# name: (script, changes of its configuration, arguments of its weights())
RANDOM = {
    "llama": ("llama", {**LLAMA, "head_dim": 32, "num_hidden_layers": 8}, {"dtype": "F32"}),
    "llama-160": ("llama", {**NARROW, "head_dim": 32}, {"dtype": "BF16"}),
    "llama-72": ("llama", {**ODD, "head_dim": 24}, {"dtype": "F32"}),
    "llama-tied": ("llama", {**LLAMA, "head_dim": 32, "tie_word_embeddings": True}, {"dtype": "F16", "head": False}),
    "llama-biases": ("llama", {**LLAMA, "head_dim": 32, "attention_bias": True, "mlp_bias": True}, {}),
    "llama-linear": ("llama", {**LLAMA, "head_dim": 32, "rope_scaling": {"type": "linear", "factor": 3.0}}, {}),
    "llama-llama3": ("llama", {**LLAMA, "head_dim": 32, "rope_scaling": LLAMA3}, {}),
    "llama-yarn": ("llama", {**LLAMA, "head_dim": 32, "rope_scaling": YARN}, {}),
    "llama-yarn2": ("llama", {**LLAMA, "head_dim": 32, "rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.2,
                                                                        "attention_factor": 0.9}}, {}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}, {"dtype": "BF16", "prefix": "model."}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2}, {"dtype": "F32"}),
    "mixtral-160": ("mixtral", {**NARROW, "num_local_experts": 4, "num_experts_per_tok": 2}, {"dtype": "F32"}),
    "qwen2": ("qwen2", {**LLAMA, "num_hidden_layers": 3}, {"head": False}),
    "qwen2-160": ("qwen2", {**NARROW, "tie_word_embeddings": False}, {"head": True}),
    "qwen2-yarn": ("qwen2", {**LLAMA, "rope_scaling": YARN}, {"head": False}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 64}, {"dtype": "BF16"}),
    "qwen3-yarn": ("qwen3", {**LLAMA, "head_dim": 64, "rope_scaling": YARN}, {"dtype": "F32"}),
    "qwen3-yarn2": ("qwen3", {**LLAMA, "head_dim": 64, "rope_scaling": {**YARN, "attention_factor": 1.3}}, {"dtype": "F32"}),
    "qwen3-160": ("qwen3", {**NARROW, "head_dim": 64}, {"dtype": "F32"}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, "moe_intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 3,
                                "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
                                "mlp_only_layers": []}, {"dtype": "F32"}),
    "qwen3_moe-160": ("qwen3_moe", {**NARROW, "moe_intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 3,
                                    "num_experts": 6, "num_experts_per_tok": 3, "decoder_sparse_step": 1,
                                    "mlp_only_layers": []}, {"dtype": "F32", "fused": True}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_head": 4, "n_positions": 256, "n_ctx": 256}, {"dtype": "F32", "prefix": ""}),
    "gpt2-160": ("gpt2", {"n_embd": 160, "n_head": 5, "n_positions": 256, "n_ctx": 256},
                 {"dtype": "F16", "prefix": "transformer."}),
    "gpt_neox": ("gpt_neox", {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
                              "hidden_act": "gelu_new"}, {"dtype": "F16", "buffers": True}),
    "gpt_neox-160": ("gpt_neox", {"hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 5,
                                  "use_parallel_residual": False, "hidden_act": "gelu_new"},
                     {"dtype": "F32", "buffers": False}),
    "gemma2": ("gemma2", {**LLAMA, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40,
                          "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0}, {"dtype": "F32"}),
    "gemma2-160": ("gemma2", {**NARROW, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40},
                   {"dtype": "BF16"}),
    "gemma3": ("gemma3", {**LLAMA, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40,
                          "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0, "rope_theta": 1e6},
               {"dtype": "F32"}),
    "gemma3-4": ("gemma3", {**LLAMA, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40,
                            "sliding_window_pattern": 4, "rope_local_base_freq": 5000.0, "rope_theta": 1e6},
                 {"dtype": "F32"}),
    "gemma3-160": ("gemma3", {**NARROW, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40,
                              "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0, "rope_theta": 1e6,
                              "rope_scaling": None}, {"dtype": "BF16"}),
    "phi": ("phi3", {**LLAMA, "rope_scaling": None, "sliding_window": None}, {"dtype": "F32"}),
    "phi-long": ("phi3", {**LLAMA, "original_max_position_embeddings": 64, "rope_scaling": LONG}, {"dtype": "F32"}),
    "phi-160": ("phi3", {**NARROW, "rope_scaling": None, "sliding_window": None}, {"dtype": "BF16"}),
}
# Real tokenizers, below the shared data: as what file, which one.
TOKENIZERS = {
    "gpt2": ("tokenizer.json", "tokenizers/gpt2/tokenizer.json"),
    "gpt_neox": ("tokenizer.json", "tokenizers/gpt_neox/20B_tokenizer.json"),
    "minimind": ("tokenizer.json", "tokenizers/minimind/tokenizer.json"),
    "llama2": ("tokenizer.json", "tokenizers/llama2/tokenizer.json"),
    "llama2.model": ("tokenizer.model", "tokenizers/llama2/tokenizer.model"),
    "mistral.model": ("tokenizer.model", "tokenizers/mistral/tokenizer.model.v1"),
    "stories.model": ("tokenizer.model", "tokenizers/misc/tinystories_tokenizer_4096.model"),
    "tok361": ("tokenizer.json", "models/babyllama_tok361/hf/tokenizer.json"),
}
TRAINED = ("tinystories4M", "stories260K", "babyllama_tok361")


def scale(stored, name, factor):
    """A head that is the embedding too makes logits so large that f16 in llama.cpp's GELU shows."""
    dtype, shape, data = stored[name]
    if dtype == "BF16":
        values = (numpy.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = numpy.frombuffer(data, "<f4" if dtype == "F32" else "<f2")
    stored[name] = (dtype, shape, encode(values.astype("<f4") * factor, dtype)[0])


def write_random(folder, script, changes, arguments):
    """A model with the example's tokenizer."""
    module = importlib.import_module(script)
    with open(os.path.join(EXAMPLE, "config.json"), encoding="utf-8") as file:
        vocabulary = json.load(file)["vocab_size"]
    config = {**module.BASE, "max_position_embeddings": 256, "vocab_size": vocabulary, **changes}
    config = {key: value for key, value in config.items() if value is not None or key != "rope_scaling"}
    tensors = module.weights(config, 1, **arguments)
    if script in ("gpt2", "qwen2", "gemma3"):
        scale(tensors.stored, next(n for n in tensors.stored if n.endswith(("wte.weight", "embed_tokens.weight"))), 0.15)
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(EXAMPLE, name), folder)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors.stored)


class Matrix:
    def __init__(self, options):
        self.options = options
        self.bitwright = os.path.join(options.build, "bin", "bitwright")
        self.driver = os.path.join(options.work, "llamacpp")
        self.environment = {**os.environ, "LLAMACPP_LIBRARIES": options.libraries}
        self.failures = 0

    def compile(self):
        source = os.path.join(ROOT, "tests", "peers", "llamacpp.cpp")
        includes = [f"-I{ROOT}/src", f"-I{ROOT}/include", f"-I{ROOT}/include/bitwright"]
        includes += ["-I" + path for path in self.options.headers.split(":")]
        found = [path for name in ("llama", "ggml", "ggml-base")
                 for path in sorted(glob.glob(f"{self.options.libraries}/lib{name}.*so*"))[:1]]
        needed = [f"-l{name}" for name in ("fmt", "yaml-cpp", "crypto", "z", "hwy", "pcre2-8", "utf8proc", "pthread")]
        subprocess.run(["g++", "-std=c++20", "-O2", *includes, source, f"{self.options.build}/libbitwright_core.a",
                        *found, f"-Wl,-rpath,{self.options.libraries}", "-Wl,--allow-shlib-undefined", *needed,
                        "-o", self.driver], check=True)

    def run(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False)
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip().splitlines() or ["failed"])[-1])
        return done.stdout

    def asked(self, *command):
        return json.loads(self.run(self.driver, *command))

    def write(self, model, kind, out):
        """By Bitwright."""
        how = ("--format", "gguf", "--method", "none") if kind == "none" else ("--gguf-type", kind)
        self.run(self.bitwright, "quantize", model, *how, "-o", out, "--no-verify", "--quiet")
        return os.path.join(out, "model.gguf")

    def compare(self, model, file):
        """As it is, and computed in f32."""
        size = (str(self.options.context), str(self.options.windows))
        figures = self.asked("compare", model, file, TEXT, *size)
        plain = file + ".f32"
        self.run(self.driver, "quantize", file, plain, "0")
        exact = self.asked("compare", file, plain, TEXT, *size)
        os.remove(plain)
        return figures, exact

    def row(self, name, kind, way, model, file, note=""):
        figures, exact = self.compare(model, file)
        ratio = abs(figures["ppl_llamacpp"] / figures["ppl_file"] - 1)
        other = abs(exact["ppl_llamacpp"] / exact["ppl_model"] - 1)
        # Random weights turn every rounding into noise, and 256 positions are few: computed in f32 they must agree.
        good = (name not in TRAINED or ratio < 0.005) and other < 0.0005 and exact["model"] < 0.01
        good = good and exact["greedy"] == 32 and not note
        self.failures += not good
        return (f"{name:14} {kind:7} {way:6} ppl {figures['ppl_llamacpp']:10.4f} {figures['ppl_file']:10.4f} "
                f"{100 * ratio:7.4f} % in f32 {100 * other:7.4f} %  logits {figures['file']:8.2e} in f32 {exact['model']:8.2e} of "
                f"{figures['spread']:5.1f}  KL {figures['kl']:8.1e}  top {100 * figures['top1']:6.2f} %  "
                f"greedy {figures['greedy']:2} in f32 {exact['greedy']:2} of 32  {'ok' if good else 'WRONG'} {note}")

    def both_ways(self, name, kind, model, base):
        try:
            work = os.path.join(self.options.work, f"{name}-{kind}")
            ours = self.write(model, kind, work)
            if TYPES[kind] is None:
                return [self.row(name, kind, "ours", model, ours)]
            theirs = os.path.join(work, "theirs.gguf")
            self.run(self.driver, "quantize", base, theirs, str(TYPES[kind]))
            mine, other = self.asked("types", ours), self.asked("types", theirs)
            differ = [f"{key} {mine.get(key)}/{other.get(key)}" for key in sorted({*mine, *other})
                      if mine.get(key) != other.get(key)]
            note = f"types: {len(differ)} differ: {', '.join(differ[:4])}" if differ else ""
            rows = [self.row(name, kind, "ours", model, ours, note), self.row(name, kind, "theirs", model, theirs)]
            shutil.rmtree(work)
            return rows
        except RuntimeError as error:
            self.failures += 1
            return [f"{name:14} {kind:7} WRONG  {error}"]

    def all_of(self, name, model):
        kinds = self.options.types.split(",") if self.options.types else list(TYPES)
        base = self.write(model, "none", os.path.join(self.options.work, name + "-base"))
        with ThreadPoolExecutor(2) as pool:
            for rows in pool.map(lambda kind: self.both_ways(name, kind, model, base), kinds):
                print("\n".join(rows), flush=True)


def cut(matrix):
    """Do llama.cpp and the tokenizer cut lines of English, of code and of other scripts alike?"""
    data = os.path.join(SHARED, "data")
    texts = [TEXT, os.path.join(data, "text", "wikitext2_raw_test.txt"),
             os.path.join(data, "tokenizers", "llama.cpp_vocabs", "ggml-vocab-gpt-2.gguf.inp")]
    for name, (file, source) in TOKENIZERS.items():
        model = os.path.join(matrix.options.work, "tokens-" + name)
        write_random(model, "llama", {**ODD, "head_dim": 24, "num_hidden_layers": 1}, {})
        for old in ("tokenizer.json", "tokenizer_config.json"):
            os.remove(os.path.join(model, old))
        shutil.copy(os.path.join(data, source), os.path.join(model, file))
        for text in filter(os.path.isfile, texts):
            try:
                written = os.path.join(model, "model.gguf")
                if not os.path.exists(written):
                    shutil.move(matrix.write(model, "none", model + "-out"), written)
                found = matrix.asked("tokens", written, os.path.join(model, file), text)
                matrix.failures += found["file_differs"] != 0
                print(f"{name:14} tokens  {os.path.basename(text):30} {found['lines']} lines, other tokens than the "
                      f"model's own in {found['model_differs']}, than our reading of the file in {found['file_differs']}",
                      repr(found["first"][:60]) if found["first"] else "", flush=True)
            except RuntimeError as error:
                matrix.failures += 1
                print(f"{name:14} tokens  WRONG  {error}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("headers")
    parser.add_argument("libraries")
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"))
    parser.add_argument("--work", default="/tmp/bitwright-llamacpp")
    parser.add_argument("--only", default="", help="models whose names begin so")
    parser.add_argument("--types", default="")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    os.makedirs(options.work)
    matrix = Matrix(options)
    matrix.compile()
    if "tokens".startswith(options.only) and os.path.isdir(os.path.join(SHARED, "data")):
        cut(matrix)
    for name in TRAINED:
        model = os.path.join(SHARED, "data", "models", name, "hf")
        if name.startswith(options.only) and os.path.isdir(model):
            matrix.all_of(name, model)
    for name, (script, changes, arguments) in RANDOM.items():
        if name.startswith(options.only):
            model = os.path.join(options.work, name)
            write_random(model, script, changes, arguments)
            matrix.all_of(name, model)
    print(f"{matrix.failures} wrong")
    sys.exit(matrix.failures != 0)


main()

"""GPT-2 (Radford et al. 2019): LayerNorm before each part, learned positions, GELU by tanh (arXiv:1606.08415), the
embedding matrix as output matrix. Weights are stored [inputs, outputs]."""

import math

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 36, "n_layer": 3, "n_head": 4,
        "n_positions": 50, "n_ctx": 50, "n_inner": None, "vocab_size": 267, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5}


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def forward(config, w, tokens):
    n, width, heads = len(tokens), config["n_embd"], config["n_head"]
    size = width // heads
    activation = {"gelu_new": gelu_new, "gelu": gelu}[config["activation_function"]]

    def norm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + config["layer_norm_epsilon"]) * w[name + ".weight"] + w[name + ".bias"]

    def conv1d(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:n] * config.get("positions", 1)
    for i in range(config["n_layer"]):
        at = f"h.{i}."
        q, k, v = np.split(conv1d(norm(x, at + "ln_1"), at + "attn.c_attn"), 3, axis=-1)
        parts = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            s = q[:, own] @ k[:, own].T / math.sqrt(size)
            s[np.triu_indices(n, 1)] = -np.inf
            p = np.exp(s - s.max(axis=1, keepdims=True))
            parts.append((p / p.sum(axis=1, keepdims=True)) @ v[:, own])
        x = x + conv1d(np.concatenate(parts, axis=1), at + "attn.c_proj")
        x = x + conv1d(activation(conv1d(norm(x, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def weights(config, seed, dtype, prefix):
    w = Weights(seed, dtype, prefix)
    width, wide = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    w.vocabulary = config["vocab_size"]
    w.matrix("wte.weight", w.vocabulary, width, inputs=6)
    w.matrix("wpe.weight", config["n_positions"], width, inputs=6)
    for name in ["ln_f"] + [f"h.{i}.ln_{j}" for i in range(config["n_layer"]) for j in (1, 2)]:
        w.vector(name + ".weight", width, mean=1)
        w.vector(name + ".bias", width)
    for i in range(config["n_layer"]):
        at = f"h.{i}."
        for name, inputs, outputs in (("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width),
                                      ("mlp.c_fc", width, wide), ("mlp.c_proj", wide, width)):
            w.matrix(at + name + ".weight", inputs, outputs, inputs=inputs, gain=1.5)
            w.vector(at + name + ".bias", outputs)
        mask = np.tril(np.ones((1, 1, config["n_positions"], config["n_positions"])))
        w.add(at + "attn.bias", mask)  # buffers of no consequence, as the first checkpoints have them
        w.add(at + "attn.masked_bias", np.array(-1e4))
    return w


def main():
    write_case("gpt2-plain", BASE, weights(BASE, 1, "F32", ""), forward, 50,
               [{"positions": 0}, {"layer_norm_epsilon": 0.1}])
    other = {**BASE, "n_inner": 77, "activation_function": "gelu"}
    write_case("gpt2-gelu", other, weights(other, 2, "F16", "transformer."), forward, 30, [])
    assert np.abs(gelu(np.linspace(-4, 4, 99)) - gelu_new(np.linspace(-4, 4, 99))).max() < 1e-3  # one approximates the other


if __name__ == "__main__":
    main()

"""GPT-NeoX-20B (arXiv:2204.06745) and Pythia (arXiv:2304.01373): attention and feed-forward both read the layer's input
(or one after the other), rotary positions for the first part of each head, LayerNorm, exact GELU. The fused matrix
holds q, k and v of the first head, then those of the second, and so on."""

import math

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 48, "intermediate_size": 90,
        "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 273, "hidden_act": "gelu", "rotary_pct": 0.25,
        "rotary_emb_base": 10000, "max_position_embeddings": 64, "layer_norm_eps": 1e-5,
        "use_parallel_residual": True, "tie_word_embeddings": False}


def forward(config, w, tokens):
    n, heads = len(tokens), config["num_attention_heads"]
    size = config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {"partial_rotary_factor": config["rotary_pct"],
                                             "rope_theta": config["rotary_emb_base"]}
    turning = int(size * rope["partial_rotary_factor"])

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["layer_norm_eps"]) * w[name + ".weight"] + w[
            name + ".bias"]

    def rotate(x):  # [tokens, size]
        angle = np.outer(np.arange(n), rope["rope_theta"] ** (-np.arange(0, turning, 2) / turning))
        a, b, rest = x[:, : turning // 2], x[:, turning // 2 : turning], x[:, turning:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], 1)

    def attention(x, at):
        fused = linear(x, at + "attention.query_key_value").reshape(n, heads, 3, size)
        out = []
        for head in range(heads):
            q, k, v = (fused[:, head, part] for part in range(3))
            s = rotate(q) @ rotate(k).T / math.sqrt(size) + np.triu(np.full((n, n), -np.inf), 1)
            p = np.exp(s - s.max(1, keepdims=True))
            out.append(p / p.sum(1, keepdims=True) @ v)
        return linear(np.concatenate(out, 1), at + "attention.dense")

    def feed_forward(x, at):
        h = linear(x, at + "mlp.dense_h_to_4h")
        return linear(h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2))), at + "mlp.dense_4h_to_h")

    x = w["embed_in.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        a = attention(norm(x, at + "input_layernorm"), at)
        f = feed_forward(norm(x if config["use_parallel_residual"] else x + a, at + "post_attention_layernorm"), at)
        x = x + a + f
    return norm(x, "final_layer_norm") @ w["embed_out.weight"].T


def weights(config, seed, dtype, buffers):
    w = Weights(seed, dtype, "gpt_neox.")
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_in.weight", w.vocabulary, hidden, inputs=2)
    w.matrix("embed_out.weight", w.vocabulary, hidden, prefix="")
    norms = [f"layers.{i}.{p}_layernorm" for i in range(config["num_hidden_layers"]) for p in ("input", "post_attention")]
    for name in ["final_layer_norm"] + norms:
        w.vector(name + ".weight", hidden, mean=1)
        w.vector(name + ".bias", hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        for name, rows, columns in (("attention.query_key_value", 3 * hidden, hidden),
                                    ("attention.dense", hidden, hidden), ("mlp.dense_h_to_4h", wide, hidden),
                                    ("mlp.dense_4h_to_h", hidden, wide)):
            w.matrix(at + name + ".weight", rows, columns, gain=1.5)
            w.vector(at + name + ".bias", rows)
        if buffers:
            w.add(at + "attention.bias", np.tril(np.ones((1, 1, 64, 64))), dtype="BOOL")
            w.add(at + "attention.masked_bias", np.array(-1e9), dtype="F32")
            w.add(at + "attention.rotary_emb.inv_freq", np.ones(2), dtype="F32")
    return w


def main():
    write_case("gpt_neox-parallel", BASE, weights(BASE, 1, "F16", True), forward, 40,
               [{"use_parallel_residual": False}, {"rotary_pct": 0.5}, {"rotary_emb_base": 100}])
    sequential = {key: value for key, value in BASE.items() if key not in ("rotary_pct", "rotary_emb_base")}
    sequential.update(use_parallel_residual=False,
                      rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75, "rope_theta": 500.0})
    write_case("gpt_neox-sequential", sequential, weights(sequential, 2, "F32", False), forward, 40,
               [{"use_parallel_residual": True}])


if __name__ == "__main__":
    main()

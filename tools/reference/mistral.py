"""Mistral (arXiv:2310.06825): grouped queries, and each token sees itself and the window - 1 tokens before it."""

import math

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 40, "intermediate_size": 60,
        "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 257,
        "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 7}


def rotate(x, theta):
    n, _, dim = x.shape
    angle = np.outer(np.arange(n), theta ** (-np.arange(0, dim, 2) / dim))[:, None, :]
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def forward(config, w, tokens):
    heads, kv_heads, n = config["num_attention_heads"], config["num_key_value_heads"], len(tokens)
    dim = config["hidden_size"] // heads
    window = config["sliding_window"] or n

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config["rms_norm_eps"]) * w[name + ".weight"]

    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    hidden_from = (distance < 0) | (distance >= window)
    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = ((h @ w[at + f"self_attn.{p}_proj.weight"].T).reshape(n, -1, dim) for p in "qkv")
        q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        scores = np.where(hidden_from, -np.inf, scores)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", p, v).reshape(n, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm")
        g = h @ w[at + "mlp.gate_proj.weight"].T
        x = x + (g / (1 + np.exp(-g)) * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "norm") @ w["lm_head.weight"].T


def weights(config, seed, dtype, prefix):
    w = Weights(seed, dtype, prefix)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=1)
    w.matrix("lm_head.weight", w.vocabulary, hidden, prefix="")
    w.vector("norm.weight", hidden, mean=1)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        w.vector(at + "input_layernorm.weight", hidden, mean=1)
        w.vector(at + "post_attention_layernorm.weight", hidden, mean=1)
        for name, rows, columns in (("self_attn.q", hidden, hidden), ("self_attn.k", kv, hidden),
                                    ("self_attn.v", kv, hidden), ("self_attn.o", hidden, hidden),
                                    ("mlp.gate", wide, hidden), ("mlp.up", wide, hidden), ("mlp.down", hidden, wide)):
            w.matrix(at + name + "_proj.weight", rows, columns, gain=1.6)
    return w


def main():
    write_case("mistral-window", BASE, weights(BASE, 1, "BF16", "model."), forward, 40,
               [{"sliding_window": None}, {"sliding_window": 8}, {"sliding_window": 6}])
    full = {**BASE, "sliding_window": None}  # as from version 0.2 on
    write_case("mistral-full", full, weights(full, 2, "F32", ""), forward, 40, [{"sliding_window": 20}])


if __name__ == "__main__":
    main()

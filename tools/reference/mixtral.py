"""Mixtral (arXiv:2401.04088): each token goes through the two (or k) experts with the largest router logits, weighted by
the softmax of these logits alone."""

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 36, "intermediate_size": 44,
        "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 259,
        "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "sliding_window": None, "num_local_experts": 5, "num_experts_per_tok": 2, "tie_word_embeddings": False}


def forward(config, w, tokens):
    n, heads = len(tokens), config["num_attention_heads"]
    size = config["hidden_size"] // heads
    angle = np.outer(np.arange(n), config["rope_theta"] ** (-np.arange(0, size, 2) / size))[:, None]

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * w[name + ".weight"]

    def rotate(x):
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def experts(h, at):  # one token
        logits = w[at + "gate.weight"] @ h
        best = np.argsort(-logits)[: config["num_experts_per_tok"]]
        weight = np.exp(logits[best] - logits[best].max())
        weight /= weight.sum()
        out = 0
        for e, share in zip(best, weight):
            gate = w[f"{at}experts.{e}.w1.weight"] @ h
            up = w[f"{at}experts.{e}.w3.weight"] @ h
            out = out + share * (w[f"{at}experts.{e}.w2.weight"] @ (gate / (1 + np.exp(-gate)) * up))
        return out

    window = config["sliding_window"] or n
    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = ((h @ w[f"{at}self_attn.{p}_proj.weight"].T).reshape(n, -1, size) for p in "qkv")
        q, k = rotate(q), rotate(k)
        outs = []
        for head in range(heads):
            shared = head * config["num_key_value_heads"] // heads
            s = q[:, head] @ k[:, shared].T / np.sqrt(size)
            s[(np.tri(n) == 0) | (np.tri(n, k=-window) == 1)] = -np.inf
            p = np.exp(s - s.max(-1, keepdims=True))
            outs.append(p / p.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(outs, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm")
        x = x + np.array([experts(row, at + "block_sparse_moe.") for row in h])
    return norm(x, "norm") @ w["lm_head.weight"].T


def weights(config, seed, dtype):
    w = Weights(seed, dtype, "model.")
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
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            w.matrix(f"{at}self_attn.{name}_proj.weight", rows, hidden, gain=1.5)
        w.matrix(at + "block_sparse_moe.gate.weight", config["num_local_experts"], hidden, gain=1.5)
        for e in range(config["num_local_experts"]):
            for name, rows, columns in (("w1", wide, hidden), ("w2", hidden, wide), ("w3", wide, hidden)):
                w.matrix(f"{at}block_sparse_moe.experts.{e}.{name}.weight", rows, columns, gain=1.5)
    return w


def main():
    write_case("mixtral-full", BASE, weights(BASE, 1, "BF16"), forward, 40,
               [{"num_experts_per_tok": 1}, {"num_experts_per_tok": 3}])
    window = {**BASE, "sliding_window": 9, "num_experts_per_tok": 3}
    write_case("mixtral-window", window, weights(window, 2, "F32"), forward, 40, [{"sliding_window": None}])


if __name__ == "__main__":
    main()

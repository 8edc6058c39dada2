"""Qwen3 (arXiv:2505.09388): each head's query and key goes through an RMSNorm before it is rotated; no biases unless the
configuration asks for them; heads may be wider than hidden size / heads."""

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 42, "intermediate_size": 66,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14, "vocab_size": 265,
        "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 5000.0,
        "attention_bias": False, "use_sliding_window": False, "tie_word_embeddings": False}


def rms(x, gain, eps):
    return x * gain / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def forward(config, w, tokens):
    n, dim, eps = len(tokens), config["head_dim"], config["rms_norm_eps"]
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    angles = np.arange(n)[:, None, None] * config["rope_theta"] ** (-2 * np.arange(dim // 2) / dim)

    def project(name, h):
        y = h @ w[name + ".weight"].T
        return y + w[name + ".bias"] if config["attention_bias"] else y

    def prepare(x, norm):
        x = x.reshape(n, -1, dim)
        if config.get("head_norms", True):
            x = rms(x, w[norm], eps)
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                               second * np.cos(angles) + first * np.sin(angles)], -1)

    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}.self_attn."
        h = rms(x, w[f"layers.{i}.input_layernorm.weight"], eps)
        q = prepare(project(at + "q_proj", h), at + "q_norm.weight")
        k = prepare(project(at + "k_proj", h), at + "k_norm.weight").repeat(groups, axis=1)
        v = project(at + "v_proj", h).reshape(n, -1, dim).repeat(groups, axis=1)
        s = np.einsum("qhd,khd->hqk", q, k) * dim**-0.5 + np.triu(np.full((n, n), -np.inf), 1)
        p = np.exp(s - s.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
        x = x + project(at + "o_proj", mixed)
        at = f"layers.{i}.mlp."
        h = rms(x, w[f"layers.{i}.post_attention_layernorm.weight"], eps)
        gate = h @ w[at + "gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[at + "up_proj.weight"].T)) @ w[at + "down_proj.weight"].T
    return rms(x, w["norm.weight"], eps) @ w["lm_head.weight"].T


def weights(config, seed, dtype):
    w = Weights(seed, dtype, "model.")
    hidden, wide, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=2)
    w.matrix("lm_head.weight", w.vocabulary, hidden, prefix="")
    w.vector("norm.weight", hidden, mean=1)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        w.vector(at + "input_layernorm.weight", hidden, mean=1)
        w.vector(at + "post_attention_layernorm.weight", hidden, mean=1)
        w.vector(at + "self_attn.q_norm.weight", dim, mean=1.3)
        w.vector(at + "self_attn.k_norm.weight", dim, mean=1.3)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            w.matrix(f"{at}self_attn.{name}_proj.weight", rows, columns, gain=1.5)
            if config["attention_bias"]:
                w.vector(f"{at}self_attn.{name}_proj.bias", rows, spread=0.5)
        for name, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
            w.matrix(f"{at}mlp.{name}_proj.weight", rows, columns, gain=1.5)
    return w


def main():
    write_case("qwen3-plain", BASE, weights(BASE, 1, "BF16"), forward, 40, [{"head_norms": False}])
    biased = {**BASE, "attention_bias": True}
    write_case("qwen3-biases", biased, weights(biased, 2, "F32"), forward, 40, [{"attention_bias": False}])


if __name__ == "__main__":
    main()

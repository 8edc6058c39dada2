"""Phi-3 (arXiv:2404.14219): q, k and v in one matrix, gate and up in another; LongRoPE (arXiv:2402.13753): each pair's
wavelength is multiplied by a factor, other ones once the text is longer than the original context; cosines and sines
times sqrt(1 + ln(context / original) / ln(original))."""

import math

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 48, "intermediate_size": 54,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 261,
        "hidden_act": "silu", "max_position_embeddings": 128, "original_max_position_embeddings": 24,
        "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "sliding_window": None, "tie_word_embeddings": False,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5, 1.9, 2.5],
                         "long_factor": [1.0, 1.6, 2.5, 4.0, 5.0, 6.5]}}


def forward(config, w, tokens):
    n, heads, kv_heads = len(tokens), config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    turning = int(size * config.get("partial_rotary_factor", 1))
    frequencies, magnitude = config["rope_theta"] ** (-np.arange(0, turning, 2) / turning), 1.0
    if config["rope_scaling"]:
        original = config["original_max_position_embeddings"]
        which = "long_factor" if n > original else "short_factor"
        frequencies = frequencies / np.array(config["rope_scaling"][which])
        magnitude = math.sqrt(1 + math.log(config["max_position_embeddings"] / original) / math.log(original))

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[name + ".weight"]

    def rotate(x):
        angle = np.outer(np.arange(n), frequencies)[:, None, :]
        c, s = magnitude * np.cos(angle), magnitude * np.sin(angle)
        a, b, rest = x[..., : turning // 2], x[..., turning // 2 : turning], x[..., turning:]
        return np.concatenate([a * c - b * s, b * c + a * s, rest], -1)

    window = config["sliding_window"] or n
    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        fused = (norm(x, at + "input_layernorm") @ w[at + "self_attn.qkv_proj.weight"].T).reshape(n, -1, size)
        q, k, v = fused[:, :heads], fused[:, heads : heads + kv_heads], fused[:, heads + kv_heads :]
        q, k = rotate(q), rotate(k)
        outs = []
        for head in range(heads):
            shared = head * kv_heads // heads
            s = q[:, head] @ k[:, shared].T / math.sqrt(size)
            s = np.where(np.tri(n) - np.tri(n, k=-window) > 0, s, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            outs.append(p / p.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(outs, -1) @ w[at + "self_attn.o_proj.weight"].T
        gate, up = np.split(norm(x, at + "post_attention_layernorm") @ w[at + "mlp.gate_up_proj.weight"].T, 2, axis=-1)
        x = x + (up * gate / (1 + np.exp(-gate))) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "norm") @ w["lm_head.weight"].T


def weights(config, seed, dtype):
    w = Weights(seed, dtype, "model.")
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=2)
    w.matrix("lm_head.weight", w.vocabulary, hidden, prefix="")
    w.vector("norm.weight", hidden, mean=1)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        w.vector(at + "input_layernorm.weight", hidden, mean=1)
        w.vector(at + "post_attention_layernorm.weight", hidden, mean=1)
        w.matrix(at + "self_attn.qkv_proj.weight", hidden + 2 * kv, hidden, gain=1.8)
        w.matrix(at + "self_attn.o_proj.weight", hidden, hidden, gain=1.5)
        w.matrix(at + "mlp.gate_up_proj.weight", 2 * wide, hidden, gain=1.5)
        w.matrix(at + "mlp.down_proj.weight", hidden, wide, gain=1.5)
    return w


def main():
    tensors = weights(BASE, 1, "BF16")
    other = [{"rope_scaling": None}]
    write_case("phi3-long", BASE, tensors, forward, 40, other + [{"original_max_position_embeddings": 64}])
    write_case("phi3-short", BASE, tensors, forward, 24, other)
    window = {**BASE, "rope_scaling": None, "sliding_window": 11, "partial_rotary_factor": 0.5}
    write_case("phi3-window", window, weights(window, 2, "F32"), forward, 40,
               [{"sliding_window": None}, {"partial_rotary_factor": 1.0}])


if __name__ == "__main__":
    main()

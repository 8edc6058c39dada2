"""Qwen2 (arXiv:2407.10671): biases on queries, keys and values; if asked for, windows from some layer on."""

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 48, "intermediate_size": 70,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 271,
        "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "sliding_window": 9, "max_window_layers": 2, "use_sliding_window": False, "tie_word_embeddings": True}


def forward(config, w, tokens):
    n, heads, kv_heads = len(tokens), config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    angle = np.arange(n)[:, None] / config["rope_theta"] ** (np.arange(dim // 2) * 2 / dim)
    turn = np.exp(1j * angle)[:, None, :]  # a pair is a complex number

    def rotate(x):
        z = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def norm(x, g):
        return g * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])

    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        h = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (h @ w[f"{at}self_attn.{p}_proj.weight"].T + config.get("bias", 1) * w[f"{at}self_attn.{p}_proj.bias"]
                   for p in "qkv")
        q, k, v = (rotate(q.reshape(n, heads, dim)), rotate(k.reshape(n, kv_heads, dim)), v.reshape(n, kv_heads, dim))
        types = config.get("layer_types")
        slides = types[i] == "sliding_attention" if types else (
            config["use_sliding_window"] and i >= config["max_window_layers"])
        rows = []
        for t in range(n):
            begin = max(0, t + 1 - config["sliding_window"]) if slides else 0
            heads_out = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                s = k[begin : t + 1, shared] @ q[t, head] / dim**0.5
                p = np.exp(s - s.max())
                heads_out.append(p @ v[begin : t + 1, shared] / p.sum())
            rows.append(np.concatenate(heads_out))
        x = x + np.array(rows) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = h @ w[at + "mlp.gate_proj.weight"].T, h @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate * up / (1 + np.exp(-gate))) @ w[at + "mlp.down_proj.weight"].T
    head = "embed_tokens" if config["tie_word_embeddings"] and "lm_head.weight" not in w else "lm_head"
    return norm(x, w["norm.weight"]) @ w[head + ".weight"].T


def weights(config, seed, head=False):
    w = Weights(seed, "F16", "model.")
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=4)
    if head:
        w.matrix("lm_head.weight", w.vocabulary, hidden, prefix="")
    w.vector("norm.weight", hidden, mean=1)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            w.vector(at + norm, hidden, mean=1)
        for p, rows in (("q", hidden), ("k", kv), ("v", kv)):
            w.matrix(f"{at}self_attn.{p}_proj.weight", rows, hidden, gain=1.5)
            w.vector(f"{at}self_attn.{p}_proj.bias", rows, spread=0.8)
        w.matrix(at + "self_attn.o_proj.weight", hidden, hidden, gain=1.5)
        w.matrix(at + "mlp.gate_proj.weight", wide, hidden, gain=1.5)
        w.matrix(at + "mlp.up_proj.weight", wide, hidden, gain=1.5)
        w.matrix(at + "mlp.down_proj.weight", hidden, wide, gain=1.5)
    return w


def main():
    write_case("qwen2-full", BASE, weights(BASE, 1), forward, 40,
               [{"bias": 0}, {"use_sliding_window": True}, {"rope_theta": 1e4}])
    sliding = {**BASE, "use_sliding_window": True}
    # An output matrix beside tied embeddings: what is stored is used (transformers 5 says so where they differ).
    write_case("qwen2-window", sliding, weights(sliding, 2, head=True), forward, 40,
               [{"use_sliding_window": False}, {"max_window_layers": 1}, {"max_window_layers": 3}])
    types = {**sliding, "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}
    write_case("qwen2-layer_types", types, weights(types, 3), forward, 40, [{"layer_types": None}])


if __name__ == "__main__":
    main()

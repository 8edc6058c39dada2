"""Gemma 2 (arXiv:2408.00118): embeddings times sqrt(hidden size); RMSNorm by 1 + weight before and after both parts; a
window in the layers 0, 2, 4 …; c tanh(s / c) on attention scores before the mask, and on the logits; GELU by tanh in a
gated feed-forward network; scores scaled by 1 / sqrt(query_pre_attn_scalar)."""

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 40, "intermediate_size": 72,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 279,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 6, "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}


def forward(config, w, tokens):
    n, heads, kv_heads, size = (len(tokens), config["num_attention_heads"], config["num_key_value_heads"],
                                config["head_dim"])
    angle = (np.arange(n)[:, None] * config["rope_theta"] ** (-np.arange(size // 2) / (size // 2)))[:, None]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * (1 + w[name + ".weight"])

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def capped(x, cap):
        return cap * np.tanh(x / cap) if cap else x

    ago = np.arange(n)[:, None] - np.arange(n)
    x = w["embed_tokens.weight"][tokens] * config["hidden_size"] ** config.get("embedding_power", 0.5)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        h = norm(x, at + "input_layernorm")
        q = rotate((h @ w[at + "self_attn.q_proj.weight"].T).reshape(n, heads, size))
        k = rotate((h @ w[at + "self_attn.k_proj.weight"].T).reshape(n, kv_heads, size))
        v = (h @ w[at + "self_attn.v_proj.weight"].T).reshape(n, kv_heads, size)
        seen = (ago >= 0) & (ago < (config["sliding_window"] if i % 2 == config.get("phase", 0) else n))
        outs = []
        for head in range(heads):
            s = q[:, head] @ k[:, head * kv_heads // heads].T / np.sqrt(config["query_pre_attn_scalar"])
            s = np.where(seen, capped(s, config["attn_logit_softcapping"]), -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            outs.append(p @ v[:, head * kv_heads // heads] / p.sum(-1, keepdims=True))
        x = x + norm(np.concatenate(outs, -1) @ w[at + "self_attn.o_proj.weight"].T, at + "post_attention_layernorm")
        h = norm(x, at + "pre_feedforward_layernorm")
        g = h @ w[at + "mlp.gate_proj.weight"].T
        g = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        h = (g * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
        x = x + norm(h, at + "post_feedforward_layernorm")
    return capped(norm(x, "norm") @ w["embed_tokens.weight"].T, config["final_logit_softcapping"])


def weights(config, seed, dtype):
    w = Weights(seed, dtype, "model.")
    hidden, wide, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=10)
    w.vector("norm.weight", hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            w.vector(f"{at}{norm}_layernorm.weight", hidden)
        for name, rows, columns in (("self_attn.q", q, hidden), ("self_attn.k", kv, hidden), ("self_attn.v", kv, hidden),
                                    ("self_attn.o", hidden, q), ("mlp.gate", wide, hidden), ("mlp.up", wide, hidden),
                                    ("mlp.down", hidden, wide)):
            w.matrix(f"{at}{name}_proj.weight", rows, columns, gain=1.6)
    return w


def main():
    write_case("gemma2-capped", BASE, weights(BASE, 1, "BF16"), forward, 40,
               [{"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"sliding_window": 40},
                {"phase": 1}, {"query_pre_attn_scalar": 12}, {"embedding_power": 0}])
    plain = {**BASE, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    write_case("gemma2-uncapped", plain, weights(plain, 2, "F32"), forward, 40, [{"attn_logit_softcapping": 2.0}])


if __name__ == "__main__":
    main()

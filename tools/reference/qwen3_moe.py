"""Qwen3 with experts (arXiv:2505.09388): some layers are dense; in the others a token's weights are the softmax over all
experts, of which the k largest are kept and, if norm_topk_prob says so, divided by their sum."""

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 40,
        "intermediate_size": 68, "moe_intermediate_size": 22, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 277, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False,
        "use_sliding_window": False, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": False}  # experts in layer 1 only


def has_experts(config, layer):
    return layer not in config["mlp_only_layers"] and (layer + 1) % config["decoder_sparse_step"] == 0


def forward(config, w, tokens):
    n, size = len(tokens), config["head_dim"]
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    angle = (np.arange(n)[:, None] / config["rope_theta"] ** (np.arange(0, size, 2) / size))[:, None]

    def norm(x, name):
        return w[name + ".weight"] * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config["rms_norm_eps"])

    def rotate(x):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def swiglu(h, gate, up, down):
        g = h @ gate.T
        return (g / (1 + np.exp(-g)) * (h @ up.T)) @ down.T

    def experts(h, at):
        logits = h @ w[at + "gate.weight"].T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.zeros_like(h)
        for t in range(n):
            best = sorted(range(config["num_experts"]), key=lambda e: -p[t, e])[: config["num_experts_per_tok"]]
            whole = sum(p[t, e] for e in best) if config["norm_topk_prob"] else 1
            for e in best:
                out[t] += p[t, e] / whole * swiglu(h[t], *(w[f"{at}experts.{e}.{m}_proj.weight"]
                                                           for m in ("gate", "up", "down")))
        return out

    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}.self_attn."
        h = norm(x, f"layers.{i}.input_layernorm")
        q, k, v = ((h @ w[f"{at}{p}_proj.weight"].T).reshape(n, -1, size) for p in "qkv")
        q, k = rotate(norm(q, at + "q_norm")), rotate(norm(k, at + "k_norm")).repeat(groups, 1)
        s = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size)
        p = np.where(np.tri(n) == 1, np.exp(s - s.max(-1, keepdims=True)), 0)
        out = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v.repeat(groups, 1))
        x = x + out.reshape(n, -1) @ w[at + "o_proj.weight"].T
        h, at = norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp."
        dense = not has_experts(config, i)
        x = x + (swiglu(h, *(w[f"{at}{m}_proj.weight"] for m in ("gate", "up", "down"))) if dense else experts(h, at))
    return norm(x, "norm") @ w["lm_head.weight"].T


def weights(config, seed, dtype, fused=False):
    w = Weights(seed, dtype, "model.")
    hidden, size = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=1)
    w.matrix("lm_head.weight", w.vocabulary, hidden, prefix="")
    w.vector("norm.weight", hidden, mean=1)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        w.vector(at + "input_layernorm.weight", hidden, mean=1)
        w.vector(at + "post_attention_layernorm.weight", hidden, mean=1)
        w.vector(at + "self_attn.q_norm.weight", size, mean=1)
        w.vector(at + "self_attn.k_norm.weight", size, mean=1)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            w.matrix(f"{at}self_attn.{name}_proj.weight", rows, columns, gain=1.5)
        if not has_experts(config, i):
            wide = config["intermediate_size"]
            for name, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
                w.matrix(f"{at}mlp.{name}_proj.weight", rows, columns, gain=1.5)
            continue
        wide, count = config["moe_intermediate_size"], config["num_experts"]
        w.matrix(at + "mlp.gate.weight", count, hidden, gain=1.5)
        for e in range(count):
            for name, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
                w.matrix(f"{at}mlp.experts.{e}.{name}_proj.weight", rows, columns, gain=2.0)
        if fused:
            fuse(w, at + "mlp.experts.", count)
    return w


def fuse(w, at, count):
    """One tensor [experts, gate rows then up rows, hidden] and one [experts, hidden, width], as transformers 5 has them."""
    def take(name, e):
        del w.stored[f"{w.prefix}{at}{e}.{name}_proj.weight"]
        return w.values[f"{at}{e}.{name}_proj.weight"]

    w.add(at + "gate_up_proj", np.stack([np.concatenate([take("gate", e), take("up", e)]) for e in range(count)]))
    w.add(at + "down_proj", np.stack([take("down", e) for e in range(count)]))


def main():
    without = [{"norm_topk_prob": False}, {"num_experts_per_tok": 2}]
    write_case("qwen3_moe-mixed", BASE, weights(BASE, 1, "BF16"), forward, 40, without)
    every = {**BASE, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 3, "norm_topk_prob": False}
    write_case("qwen3_moe-fused", every, weights(every, 2, "F32", fused=True), forward, 40,
               [{"norm_topk_prob": True}])


if __name__ == "__main__":
    main()

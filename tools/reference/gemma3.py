"""Gemma 3 (arXiv:2503.19786): of every `pattern` layers all but the last see a window only and have rotary positions of
their own (base 10000, not stretched); RMSNorm by 1 + weight also on each head's query and key; otherwise Gemma 2 without
soft caps. Models that see images hold the language model beside a vision tower."""

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 44,
        "intermediate_size": 60, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 16, "vocab_size": 281, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 200.0, "rope_local_base_freq": 50.0, "sliding_window": 5,
        "sliding_window_pattern": 3, "query_pre_attn_scalar": 10,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}


def forward(config, w, tokens):
    config = {**config, **config.get("text_config", {})}
    n, heads, size = len(tokens), config["num_attention_heads"], config["head_dim"]
    per_kv = heads // config["num_key_value_heads"]
    by_kind = config.get("rope_parameters") or {
        "full_attention": {"rope_theta": config["rope_theta"], "factor": (config["rope_scaling"] or {}).get("factor", 1)},
        "sliding_attention": {"rope_theta": config["rope_local_base_freq"]}}

    def norm(x, name):
        return x * (1 + w[name + ".weight"]) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"])

    def rotate(x, rope):
        positions = np.arange(n) / rope.get("factor", 1)
        angle = np.outer(positions, 1 / rope["rope_theta"] ** (2 * np.arange(size // 2) / size))[:, None]
        low, high = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([low * np.cos(angle) - high * np.sin(angle), low * np.sin(angle) + high * np.cos(angle)], -1)

    x = w["embed_tokens.weight"][tokens] * np.sqrt(config["hidden_size"])
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        types = config.get("layer_types")
        slides = types[i] == "sliding_attention" if types else (i + 1) % config["sliding_window_pattern"] != 0
        rope = by_kind["sliding_attention" if slides else "full_attention"]
        h = norm(x, at + "input_layernorm")
        q, k, v = ((h @ w[f"{at}self_attn.{p}_proj.weight"].T).reshape(n, -1, size) for p in "qkv")
        if config.get("head_norms", True):
            q, k = norm(q, at + "self_attn.q_norm"), norm(k, at + "self_attn.k_norm")
        q, k = rotate(q, rope), rotate(k, rope)
        out = np.zeros((n, heads, size))
        for t in range(n):
            first = max(0, t - config["sliding_window"] + 1) if slides else 0
            for head in range(heads):
                s = k[first : t + 1, head // per_kv] @ q[t, head] / np.sqrt(config["query_pre_attn_scalar"])
                p = np.exp(s - s.max())
                out[t, head] = p @ v[first : t + 1, head // per_kv] / p.sum()
        x = x + norm(out.reshape(n, -1) @ w[at + "self_attn.o_proj.weight"].T, at + "post_attention_layernorm")
        h = norm(x, at + "pre_feedforward_layernorm")
        g = h @ w[at + "mlp.gate_proj.weight"].T
        g = g * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        x = x + norm((g * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T,
                     at + "post_feedforward_layernorm")
    return norm(x, "norm") @ w["embed_tokens.weight"].T


def weights(config, seed, dtype, prefix="model."):
    w = Weights(seed, dtype, prefix)
    config = {**config, **config.get("text_config", {})}
    hidden, wide, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=20)
    w.vector("norm.weight", hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            w.vector(f"{at}{norm}_layernorm.weight", hidden)
        for norm in ("q", "k"):
            w.vector(f"{at}self_attn.{norm}_norm.weight", size)
        for name, rows, columns in (("self_attn.q", q, hidden), ("self_attn.k", kv, hidden), ("self_attn.v", kv, hidden),
                                    ("self_attn.o", hidden, q), ("mlp.gate", wide, hidden), ("mlp.up", wide, hidden),
                                    ("mlp.down", hidden, wide)):
            w.matrix(f"{at}{name}_proj.weight", rows, columns, gain=1.6)
    return w


def main():
    write_case("gemma3-text", BASE, weights(BASE, 1, "BF16"), forward, 40,
               [{"head_norms": False}, {"rope_scaling": None}, {"rope_local_base_freq": 200.0}, {"sliding_window": 40},
                {"sliding_window_pattern": 2}])
    old_keys = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    newer = {key: value for key, value in BASE.items() if key not in old_keys}
    newer["layer_types"] = ["sliding_attention", "full_attention"] * 3 + ["full_attention"]
    newer["rope_parameters"] = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}
    write_case("gemma3-layer_types", newer, weights(newer, 2, "F32"), forward, 40, [])
    images = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": BASE,
              "vision_config": {"hidden_size": 8}}
    for case, prefix in (("gemma3-images", "language_model.model."), ("gemma3-images5", "model.language_model.")):
        w = weights(images, 3, "F16", prefix)
        vision = "model." if prefix.startswith("model.") else ""
        w.matrix("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", 8, 8, prefix=vision)
        w.matrix("multi_modal_projector.mm_input_projection_weight", 8, 44, prefix=vision)
        write_case(case, images, w, forward, 40, [])


if __name__ == "__main__":
    main()

"""Llama (arXiv:2302.13971) with grouped queries (arXiv:2305.13245) and the ways of stretching rotary positions."""

import math

import numpy as np

from tiny import Weights, write_case

BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 36, "intermediate_size": 50,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 263,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": False}


def frequencies(config, length):
    """Of each pair of a head, and the factor of cosines and sines."""
    p = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta, dim = p.get("rope_theta", config.get("rope_theta", 10000.0)), config["head_dim"]
    pairs = np.arange(dim // 2)
    plain = theta ** (-2.0 * pairs / dim)
    kind, factor = p.get("rope_type", p.get("type", "default")), p.get("factor", 1.0)
    if kind == "linear":  # positions are divided (arXiv:2306.15595)
        return plain / factor, 1.0
    if kind == "dynamic":  # the base grows once the text is longer than the model was trained for
        context = config["max_position_embeddings"]
        stretch = max(length, context) * factor / context - (factor - 1)
        return (theta * stretch ** (dim / (dim - 2))) ** (-2.0 * pairs / dim), 1.0
    if kind == "llama3":
        # Wavelengths above original / low_freq_factor are stretched, those below original / high_freq_factor are not,
        # and between them both are blended linearly in original / wavelength.
        original, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
        out = []
        for f in plain:
            wavelength = 2 * math.pi / f
            if wavelength > original / low:
                out.append(f / factor)
            elif wavelength < original / high:
                out.append(f)
            else:
                smooth = (original / wavelength - low) / (high - low)
                out.append((1 - smooth) * f / factor + smooth * f)
        return np.array(out), 1.0
    if kind == "yarn":
        # arXiv:2309.00071: "NTK by parts". The ramp runs over the pairs' numbers between those that turn beta_fast and
        # beta_slow times within the original context; the attention temperature is 0.1 ln(s) + 1.
        original = p.get("original_max_position_embeddings", config["max_position_embeddings"])

        def pair_that_turns(times):
            return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_turns(p.get("beta_fast", 32)), pair_that_turns(p.get("beta_slow", 1))
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((pairs - low) / ((high - low) or 0.001), 0, 1)
        temperature = p.get("attention_factor") or 0.1 * math.log(factor) + 1
        if "mscale" in p:
            temperature = (0.1 * p["mscale"] * math.log(factor) + 1) / (0.1 * p["mscale_all_dim"] * math.log(factor) + 1)
        return plain / factor * ramp + plain * (1 - ramp), temperature
    assert kind == "default"
    return plain, 1.0


def rotate(x, config):
    """x: [tokens, heads, head_dim]; element i turns with element i + head_dim / 2."""
    freq, magnitude = frequencies(config, len(x))
    angle = np.outer(np.arange(len(x)), freq)[:, None, :]
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def norm(x, w, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * w


def silu(x):
    return x / (1 + np.exp(-x))


def forward(config, w, tokens):
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, n = config["rms_norm_eps"], len(tokens)

    def linear(name, x, has_bias):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if has_bias else y

    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        bias = config.get("attention_bias", False)
        h = norm(x, w[at + "input_layernorm.weight"], eps)
        q = rotate(linear(at + "self_attn.q_proj", h, bias).reshape(n, heads, dim), config)
        k = rotate(linear(at + "self_attn.k_proj", h, bias).reshape(n, kv_heads, dim), config)
        v = linear(at + "self_attn.v_proj", h, bias).reshape(n, kv_heads, dim)
        out = np.zeros((n, heads, dim))
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = q[:, head] @ k[:, shared].T / math.sqrt(dim)
            scores[np.triu_indices(n, 1)] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = p / p.sum(axis=-1, keepdims=True) @ v[:, shared]
        x = x + linear(at + "self_attn.o_proj", out.reshape(n, heads * dim), bias)
        h = norm(x, w[at + "post_attention_layernorm.weight"], eps)
        bias = config.get("mlp_bias", False)
        h = silu(linear(at + "mlp.gate_proj", h, bias)) * linear(at + "mlp.up_proj", h, bias)
        x = x + linear(at + "mlp.down_proj", h, bias)
    x = norm(x, w["norm.weight"], eps)
    return x @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def weights(config, seed, dtype="F32", prefix="model.", mixed=(), head=True):
    w = Weights(seed, dtype, prefix)
    hidden, wide, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    w.vocabulary = config["vocab_size"]
    w.matrix("embed_tokens.weight", w.vocabulary, hidden, inputs=1 if head else hidden / 4)
    w.vector("norm.weight", hidden, mean=1)
    if head:
        w.matrix("lm_head.weight", w.vocabulary, hidden, prefix="")
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            w.vector(at + name + ".weight", hidden, mean=1)
        kinds = list(mixed) or [dtype]
        for j, (name, rows, columns, bias) in enumerate([
                ("self_attn.q_proj", q, hidden, "attention_bias"), ("self_attn.k_proj", kv, hidden, "attention_bias"),
                ("self_attn.v_proj", kv, hidden, "attention_bias"), ("self_attn.o_proj", hidden, q, "attention_bias"),
                ("mlp.gate_proj", wide, hidden, "mlp_bias"), ("mlp.up_proj", wide, hidden, "mlp_bias"),
                ("mlp.down_proj", hidden, wide, "mlp_bias")]):
            w.matrix(at + name + ".weight", rows, columns, gain=1.6, dtype=kinds[(i + j) % len(kinds)])
            if config.get(bias):
                w.vector(at + name + ".bias", rows)
        w.add(at + "self_attn.rotary_emb.inv_freq", np.ones(dim // 2))  # old checkpoints have it
    return w


def main():
    plain = [{"rope_scaling": None}]
    short = {**BASE, "max_position_embeddings": 16}
    cases = {
        "plain": (BASE, {}, [{"rope_theta": 9000.0}, {"rms_norm_eps": 0.1}]),
        "biases": ({**BASE, "attention_bias": True, "mlp_bias": True}, {"dtype": "F16"},
                   [{"attention_bias": False}, {"mlp_bias": False}]),
        "tied": ({**BASE, "tie_word_embeddings": True}, {"head": False, "prefix": "", "dtype": "BF16"}, []),
        "mixed": (BASE, {"mixed": ["F64", "F8_E4M3", "F16", "F8_E5M2", "BF16", "F32"], "prefix": "base.of.model."}, []),
        "double": (BASE, {"dtype": "F64"}, []),
        "linear": ({**BASE, "rope_scaling": {"type": "linear", "factor": 3.0}}, {}, plain),
        "dynamic": ({**short, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}, {}, plain),
        "llama3": ({**BASE, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                             "high_freq_factor": 4.0, "original_max_position_embeddings": 60}}, {},
                   plain + [{"rope_scaling": {"rope_type": "linear", "factor": 8.0}}]),
        "yarn": ({**BASE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                                           "beta_fast": 2, "beta_slow": 0.1}}, {},
                 plain + [{"rope_scaling": {"rope_type": "linear", "factor": 4.0}}]),
        "yarn5": ({**{k: v for k, v in BASE.items() if k != "rope_theta"},
                   "rope_parameters": {"rope_type": "yarn", "rope_theta": 700.0, "factor": 6.0, "truncate": False,
                                       "original_max_position_embeddings": 10, "beta_fast": 1.5, "beta_slow": 0.2,
                                       "mscale": 0.8, "mscale_all_dim": 0.3}}, {},
                  [{"rope_parameters": {"rope_theta": 700.0}}]),
    }
    for seed, (name, (config, how, without)) in enumerate(cases.items()):
        write_case("llama-" + name, config, weights(config, seed, **how), forward, 45, without)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes a Llama-shaped bf16 model of any size without a tokenizer, for measuring.

    synthetic_model.py DIR SHAPE [--random] [--shards N]

SHAPE: 8b (Llama-3-8B), 1b (TinyLlama-1.1B), or hidden,ffn,layers,kv_rows,vocabulary. Zeros, in sparse files that take
no disk space, unless --random: then normal weights, from one generated block that is repeated at changing offsets.
"""
import argparse
import json
import os
import struct

SHAPES = {"8b": (4096, 14336, 32, 1024, 128256), "1b": (2048, 5632, 22, 256, 32000)}
BLOCK = 1 << 22  # random numbers that are repeated


def tensors(hidden, ffn, layers, kv_rows, vocabulary):
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv_rows), ("v", kv_rows), ("o", hidden)):
            yield at + f"self_attn.{name}_proj.weight", (rows, hidden)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (ffn, hidden)
        yield at + "mlp.up_proj.weight", (ffn, hidden)
        yield at + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def config(hidden, ffn, layers, kv_rows, vocabulary):
    head = 128 if hidden >= 4096 else 64
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": kv_rows // head,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def size(shape):
    count = 2
    for dim in shape:
        count *= dim
    return count


def random_block():
    import random

    rng = random.Random(7)
    values = [rng.gauss(0, 0.02) for _ in range(1 << 16)]
    unit = b"".join(struct.pack("<f", v)[2:] for v in values)
    return unit * (BLOCK // len(unit))


def write_shard(path, listed, block):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in listed:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size(shape)]}
        offset += size(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if block is None:
            file.truncate(8 + len(text) + offset)
            return
        for at in range(0, offset, len(block) // 2):
            shift = at // 64 % (len(block) // 4) * 2  # so that neighbouring rows differ
            file.write(block[shift : shift + min(len(block) // 2, offset - at)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("shape")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--shards", type=int, default=1)
    options = parser.parse_args()
    shape = SHAPES.get(options.shape) or tuple(int(n) for n in options.shape.split(","))
    listed = list(tensors(*shape))
    block = random_block() if options.random else None
    os.makedirs(options.directory)
    with open(os.path.join(options.directory, "config.json"), "w") as file:
        json.dump(config(*shape), file)
    total, shards = sum(size(s) for _, s in listed), [[]]
    for tensor in listed:
        if len(shards) < options.shards and sum(size(s) for _, s in shards[-1]) >= total / options.shards:
            shards.append([])
        shards[-1].append(tensor)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        for i in range(len(shards))
    ]
    for name, shard in zip(names, shards):
        write_shard(os.path.join(options.directory, name), shard, block)
    if len(shards) > 1:
        index = {n: names[i] for i, shard in enumerate(shards) for n, _ in shard}
        with open(os.path.join(options.directory, "model.safetensors.index.json"), "w") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": index}, file)


main()

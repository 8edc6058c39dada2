"""Random tensors, safetensors files and the cases that the scripts beside this one write.

Each script is a second implementation of one architecture, in float64 numpy, written from the papers and the public
descriptions of the models, to check the C++ one. It writes, for each case, FOLDER/CASE/model (config.json and
model.safetensors, tiny and random) and FOLDER/CASE/expected.safetensors (token ids and the logits that follow them).
"""

import json
import os
import struct
import sys

import numpy as np


def _f8_values(exponent_bits, mantissa_bits, bias, has_infinity):
    """The value of each of the 256 codes (OCP 8-bit floating point specification 1.0)."""
    values = []
    for code in range(256):
        sign = -1.0 if code & 128 else 1.0
        exponent = (code & 127) >> mantissa_bits
        mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        top = exponent == (1 << exponent_bits) - 1
        if top and (has_infinity or code & 7 == 7):
            values.append(np.nan)  # infinities too: never drawn
        elif exponent == 0:
            values.append(sign * mantissa * 2.0 ** (1 - bias))
        else:
            values.append(sign * (1 + mantissa) * 2.0 ** (exponent - bias))
    return np.array(values)


_F8 = {"F8_E4M3": _f8_values(4, 3, 7, False), "F8_E5M2": _f8_values(5, 2, 15, True)}
_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "BOOL": "?"}


def encode(values, dtype):
    """Bytes of `values` as safetensors stores them, and the values that these bytes stand for."""
    if dtype in _PLAIN:
        stored = np.ascontiguousarray(values, dtype=_PLAIN[dtype])
        return stored.tobytes(), stored.astype(np.float64)
    if dtype == "BF16":  # drawn towards zero: any bf16 will do
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4") >> 16
        return bits.astype("<u2").tobytes(), (bits << 16).astype("<u4").view("<f4").astype(np.float64)
    table = _F8[dtype]
    distance = np.abs(np.asarray(values)[..., None] - np.where(np.isnan(table), 1e9, table))
    codes = distance.argmin(axis=-1).astype(np.uint8)
    return codes.tobytes(), table[codes]


def write_safetensors(path, tensors):
    """tensors: name -> (dtype, shape, bytes). https://github.com/huggingface/safetensors"""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)


class Weights:
    """Random tensors by name, as float64; remembers how they are stored."""

    def __init__(self, seed, dtype="F32", prefix=""):
        self.random = np.random.RandomState(seed)
        self.dtype, self.prefix = dtype, prefix
        self.stored, self.values = {}, {}

    def add(self, name, values, dtype=None, prefix=None):
        dtype = dtype or self.dtype
        data, exact = encode(values, dtype)
        full = (self.prefix if prefix is None else prefix) + name
        self.stored[full] = (dtype, np.shape(values), data)
        self.values[name] = exact

    def matrix(self, name, *shape, gain=1.0, inputs=None, **how):
        """Standard deviation gain / sqrt(inputs): products keep their size."""
        self.add(name, self.random.randn(*shape) * gain / np.sqrt(inputs or shape[-1]), **how)

    def vector(self, name, size, mean=0.0, spread=0.3, **how):
        self.add(name, mean + spread * self.random.randn(size), **how)


def write_case(case, config, weights, forward, length, without=()):
    """Computes the logits of `length` random tokens and writes the case. without: changes of the configuration each of
    which must change the logits visibly, or a mistake there would go unseen."""
    tokens = np.random.RandomState(7).randint(0, weights.vocabulary, length)
    logits = forward(config, weights.values, tokens)
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 30, (case, logits.std())
    for change in without:
        other = forward({**config, **change}, weights.values, tokens)
        assert np.abs(other - logits).max() > 0.05, (case, change, np.abs(other - logits).max())
    folder = os.path.join(sys.argv[1], case)
    os.makedirs(os.path.join(folder, "model"), exist_ok=True)
    with open(os.path.join(folder, "model", "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
    write_safetensors(os.path.join(folder, "model", "model.safetensors"), weights.stored)
    expected = {"tokens": ("I32", tokens.shape, encode(tokens, "I32")[0]),
                "logits": ("F32", logits.shape, encode(logits, "F32")[0])}
    write_safetensors(os.path.join(folder, "expected.safetensors"), expected)

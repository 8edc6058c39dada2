"""Writes hqq.pt beside it, a qmodel.pt as HQQ's save_quantized lays it out, with PyTorch 1.13.1: python3 make_hqq.py

Codes are i * 7 % 16, scales 0.5, zeros the number of the group. "new" is a layer of today's HQQ, "old" one of 2023, "columns" has
its groups along axis 0."""
import torch

shape = torch.Size([4, 16])
codes = (torch.arange(64) * 7 % 16).to(torch.uint8).reshape(8, 8)
packed = codes[:4] << 4 | codes[4:]
scale = torch.full([8, 1], 0.5, dtype=torch.float16)
zero = torch.arange(8, dtype=torch.float16).reshape(8, 1)
meta = {"nbits": 4, "group_size": 8, "shape": shape, "scale": scale, "zero": zero, "axis": 1, "packing": "4bit_u8"}
state = {
    "W_q": torch.nn.Parameter(packed, requires_grad=False),
    **meta,
    "unpack_view_dtype": torch.uint8,
    "view_as_float": False,
    "quant_scale": False,
    "quant_zero": False,
    "compute_dtype": torch.float16,
    "bias": torch.zeros(4, dtype=torch.float16),
    "offload_meta": False,
    "stores_quant_config": True,
    "channel_wise": True,
    "optimize": True,
    "round_zero": True,
}
columns = {**state, "axis": 0, "scale": scale.reshape(1, 8), "zero": zero.reshape(1, 8)}
torch.save(
    {
        "model.norm": {"weight": torch.full([8], 2.0, dtype=torch.float16)},
        "model.layers.0.new": state,
        "model.layers.0.old": {"W_q": packed, "meta": {**meta, "quant_scale": False, "quant_zero": False}, "bias": None},
        "model.layers.0.columns": columns,
    },
    "hqq.pt",
)

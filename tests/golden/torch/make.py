"""Writes the files beside it, with PyTorch 1.13.1 (Debian 12's python3-torch): python3 make.py"""
import collections

import torch

number = torch.arange
base = number(40, dtype=torch.float32)
tied = number(6, dtype=torch.float32).reshape(2, 3) + 100
state = collections.OrderedDict(
    [
        ("plain", number(24, dtype=torch.float32).reshape(4, 6)),
        ("transposed", number(24, dtype=torch.float32).reshape(4, 6).t()),
        ("tied.a", tied),
        ("tied.b", tied),
        ("slice", base[5:11].reshape(2, 3)),
        ("columns", base.reshape(5, 8)[1:4, 2:5]),
        ("permuted", number(24, dtype=torch.int32).reshape(2, 3, 4).permute(2, 0, 1)),
        ("expanded", torch.tensor([7.0]).expand(3, 2)),
        ("half", torch.tensor([1.5, -2.0], dtype=torch.float16)),
        ("bfloat16", torch.tensor([1.5, -2.0], dtype=torch.bfloat16)),
        ("double", torch.tensor([1.5, -2.0], dtype=torch.float64)),
        ("int64", torch.tensor([1, -2], dtype=torch.int64)),
        ("int16", torch.tensor([1, -2], dtype=torch.int16)),
        ("int8", torch.tensor([1, -2], dtype=torch.int8)),
        ("uint8", torch.tensor([1, 254], dtype=torch.uint8)),
        ("bool", torch.tensor([True, False])),
        ("scalar", torch.tensor(3.0)),
        ("empty", torch.empty(0, 4)),
        ("five", number(32, dtype=torch.float32).reshape(2, 2, 2, 2, 2)),
        ("parameter", torch.nn.Parameter(torch.tensor([9.0]))),
    ]
)
torch.save(state, "views.pt")
torch.save(state, "views_legacy.pt", _use_new_zipfile_serialization=False)

model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
optimizer = torch.optim.Adam(model.parameters())
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
with torch.no_grad():
    for i, p in enumerate(model.parameters()):
        p.copy_(number(p.numel(), dtype=torch.float32).reshape(p.shape) + 10 * i)
arguments = {"lr": 1e-3, "betas": (0.9, 0.95), "tags": ["a", None, True]}
torch.save(
    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": arguments, "big": 1 << 40},
    "training.pt",
)
torch.save(model, "module.pt")  # asks for torch's classes, not only for tensors

#!/usr/bin/env python3
"""Training speed against PyTorch: the model of train.cpp, step for step, in PyTorch's own operations.

  peer_train.py MODE [STEPS]         fp32 or bf16 (autocast); jemalloc is preloaded where it is installed
  peer_train.py --against PROGRAM    PROGRAM (train_bench) and both modes in turn, three rounds, the best of each
OMP_NUM_THREADS: of both sides; all cores otherwise.
"""
import glob
import os
import re
import subprocess
import sys
import time

BATCH, LENGTH, WORDS, HIDDEN, LAYERS, HEADS, WIDE = 8, 256, 32000, 288, 6, 6, 768
THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))


def model():
    import torch
    import torch.nn.functional as F
    from torch import nn

    half = HIDDEN // HEADS // 2
    angles = torch.arange(LENGTH).unsqueeze(1) * 10000.0 ** (-torch.arange(half) / half)
    cosine, sine = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    hidden_mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)

    def rotate(x):
        a, b = x.split(half, -1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(HIDDEN))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Norm(), Norm()
            self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(HIDDEN, WIDE, bias=False) for _ in range(2))
            self.down = nn.Linear(WIDE, HIDDEN, bias=False)

        def forward(self, x):
            y = self.norm1(x)
            q, k, v = (m(y).view(BATCH, LENGTH, HEADS, -1) for m in (self.q, self.k, self.v))
            q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
            scores = torch.matmul(q, k.transpose(2, 3)) * (HIDDEN // HEADS) ** -0.5 + hidden_mask
            mixed = torch.matmul(torch.softmax(scores.float(), -1).type_as(v), v)
            x = x + self.o(mixed.transpose(1, 2).reshape(BATCH, LENGTH, HIDDEN))
            y = self.norm2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(WORDS, HIDDEN)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.norm = Norm()
            for p in self.parameters():
                if p.dim() == 2:
                    nn.init.normal_(p, std=0.02)

        def forward(self, tokens, targets):
            x = self.embedding(tokens)
            for layer in self.layers:
                x = layer(x)
            logits = F.linear(self.norm(x), self.embedding.weight)
            return F.cross_entropy(logits.float().view(-1, WORDS), targets.reshape(-1))

    return Llama()


def run(mode, steps):
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    llama = model()
    adamw = torch.optim.AdamW(llama.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    best, best_processor = 1e9, 1e9
    for step in range(steps + 1):
        tokens = torch.randint(WORDS, (BATCH, LENGTH + 1))
        start, processor = time.monotonic(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
            loss = llama(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        value = loss.item()
        if step > 0:
            best = min(best, time.monotonic() - start)
            best_processor = min(best_processor, time.process_time() - processor)
    count = sum(p.numel() for p in llama.parameters())
    print(f"{count} parameters, PyTorch {torch.__version__} {mode}, {torch.get_num_threads()} threads: "
          f"{BATCH * LENGTH / best:.0f} tokens/s, step {best:.3f} s, processor {best_processor:.3f} s, loss {value:.4f}",
          flush=True)


def against(program):
    jemalloc = glob.glob("/usr/lib/*/libjemalloc.so.2")
    plain = dict(os.environ)
    kept = dict(plain, LD_PRELOAD=jemalloc[0], MALLOC_CONF="dirty_decay_ms:-1,muzzy_decay_ms:-1") if jemalloc else plain
    commands = {"PyTorch fp32": ([sys.executable, __file__, "fp32", "3"], kept),
                "PyTorch bf16": ([sys.executable, __file__, "bf16", "3"], kept),
                "ours f32": ([program, "f32", "5", str(THREADS)], plain),
                "ours bf16": ([program, "bf16", "5", str(THREADS)], plain)}
    rates = {name: 0.0 for name in commands}
    for _ in range(3):
        for name, (command, environment) in commands.items():
            line = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            print(line, end="", flush=True)
            rates[name] = max(rates[name], float(re.search(r"([\d.]+) tokens/s", line)[1]))
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} tokens/s, {rate / rates['PyTorch fp32']:.2f} x PyTorch fp32, "
              f"{rate / rates['PyTorch bf16']:.2f} x PyTorch bf16")


if __name__ == "__main__":
    if sys.argv[1] == "--against":
        against(sys.argv[2])
    else:
        run(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)

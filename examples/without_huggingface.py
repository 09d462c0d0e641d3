"""MoE layers without Hugging Face: ``moe_kernels.modules.MoE`` in a small network of your own.

python examples/without_huggingface.py [steps]
"""

import sys

import torch
from torch import nn

from moe_kernels.modules import MoE

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
device = "cuda" if torch.cuda.is_available() else "cpu"


class Network(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int):
        super().__init__()
        self.embed = nn.Linear(inputs, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(layers))
        self.moes = nn.ModuleList(
            MoE(hidden_size=hidden, intermediate_size=64, num_experts=16, top_k=2, shared_intermediate_size=64)
            for _ in range(layers)
        )
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x):
        x = self.embed(x)
        for norm, moe in zip(self.norms, self.moes, strict=True):
            x = x + moe(norm(x))
        return self.head(x)


torch.manual_seed(0)
model = Network(inputs=8, hidden=64, outputs=4, layers=2).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

# Something to learn: which of four regions of space a point lies in, each bounded by its own waves.
directions = torch.randn(8, 4, device=device)
for step in range(1, STEPS + 1):
    x = torch.randn(512, 8, device=device)
    target = torch.sin(x @ directions).argmax(-1)
    loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step == STEPS or step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")

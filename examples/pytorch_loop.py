"""A plain PyTorch loop over a Hugging Face MoE model, here DeepSeek-V3 in small.

python examples/pytorch_loop.py [steps]
"""

import argparse
import sys

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import moe_kernels

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
LENGTH, BATCH = 64, 8
device = "cuda" if torch.cuda.is_available() else "cpu"

moe_kernels.enable()  # models built from here on use the kernels; moe_kernels.patch(model) does it for an existing one

torch.manual_seed(0)
model = DeepseekV3ForCausalLM(
    DeepseekV3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        bos_token_id=None,
        eos_token_id=None,
    )
).to(device)
print(moe_kernels.report(model))

with open(argparse.__file__, "rb") as file:  # the bytes of some Python source are the tokens
    tokens = torch.tensor(list(file.read()), device=device)

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model.train()
for step in range(1, STEPS + 1):
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
    batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step == STEPS or step % 10 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")

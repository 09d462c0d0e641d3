"""An ordinary Hugging Face Trainer script. One added line makes its MoE layers run on moe_kernels.

    python examples/trainer.py [steps]

With a checkpoint of your own: ``AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")`` instead of the small
random model.
"""

import argparse
import sys
import tempfile

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed

import moe_kernels.auto  # <-- the one added line

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
LENGTH = 64


def dataset() -> list[dict]:
    """The bytes of a Python source file, cut into sequences: bytes are tokens enough for an example."""
    with open(argparse.__file__, "rb") as file:
        tokens = torch.tensor(list(file.read()))
    return [{"input_ids": ids, "labels": ids} for ids in tokens.split(LENGTH) if len(ids) == LENGTH]


set_seed(0)
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=None,
    )
)
print(moe_kernels.report(model))

with tempfile.TemporaryDirectory() as directory:
    trainer = Trainer(
        model=model,
        train_dataset=dataset(),
        args=TrainingArguments(
            output_dir=directory,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=max(1, STEPS // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()

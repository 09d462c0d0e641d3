"""Does stock Transformers read what we trained? Run by its path in a fresh process: ``python reload.py SPEC.json``.

Loads the checkpoint with no ``moe_kernels`` anywhere, evaluates the held-out sequences, and counts on the way how many
tokens each expert gets: hooks belong here, where they can't disturb a training step.
"""

import json
import sys
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def count_tokens(model) -> dict[str, torch.Tensor]:
    """Hook every experts module; the returned counts fill up as the model runs."""
    counts = {}
    for name, module in model.named_modules():
        # What Transformers' use_experts_implementation sets on each class that it decorates.
        if not (hasattr(module, "has_gate") and hasattr(module, "num_experts")):
            continue
        counts[name] = torch.zeros(module.num_experts, dtype=torch.long)

        def count(module, args, kwargs, counted=counts[name]):
            indices = next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and not x.is_floating_point())
            counted += torch.bincount(indices.flatten().cpu(), minlength=len(counted))[: len(counted)]

        module.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def evaluate(spec: dict) -> dict:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AutoTokenizer.from_pretrained(spec["checkpoint"])
    model = AutoModelForCausalLM.from_pretrained(spec["checkpoint"], dtype=getattr(torch, spec["dtype"]))
    model.to(spec["device"]).eval()
    counts = count_tokens(model)
    tokens = torch.from_numpy(numpy.load(spec["held_out"]).astype(numpy.int64)).to(spec["device"])
    total = 0.0
    with torch.no_grad():
        for batch in tokens.split(spec["batch_size"]):
            total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    return {
        "held_out_loss": total / len(tokens),
        "expert_load": {name: (count / count.sum()).tolist() for name, count in counts.items()},
    }


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    result = evaluate(spec)
    assert not any(name.partition(".")[0] == "moe_kernels" for name in sys.modules), "moe_kernels was imported"
    Path(spec["result"]).write_text(json.dumps(result))

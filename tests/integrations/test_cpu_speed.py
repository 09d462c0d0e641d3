"""On a CPU the accelerated model costs no more than stock: people debug there before they rent a GPU."""

import time
from statistics import median

import pytest
import torch
import transformers

from tests.integrations.models import FAMILIES, tokens

LIMIT = 1.1
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_is_as_fast_as_stock(dtype, enabled, one_thread):
    """CPU time of one thread, medians of alternating steps: what else the machine does meets both alike."""
    config = transformers.Qwen3MoeConfig(**{**FAMILIES["qwen3_moe"][1], **SIZES})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    ids = tokens(2, 256)

    def step(implementation):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        start = time.process_time()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return time.process_time() - start

    ours, stock = [], []
    for _ in range(40):
        ours.append(step("moe_kernels"))
        stock.append(step("grouped_mm"))
        if len(ours) >= 11 and median(ours) <= LIMIT * median(stock):
            return
    pytest.fail(f"{median(ours) * 1e3:.1f} ms against stock's {median(stock) * 1e3:.1f} ms, allowed {LIMIT}x")

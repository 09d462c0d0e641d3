"""accumulate_grad with the wrappers of torch.distributed, two processes of gloo on the CPU each."""

import contextlib
import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_kernels import use_backend
from moe_kernels.modules import MoE

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
STEPS = 2
REFUSED = {
    "ddp": "DistributedDataParallel takes gradients from autograd",
    "fsdp1": "a weight is neither a parameter nor the .mT of one",
}


class Model(nn.Module):
    def __init__(self, accumulate_grad):
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.moe = MoE(16, 8, 4, 2, accumulate_grad=accumulate_grad)

    def forward(self, x):
        return self.moe(self.before(x))


def train(rank, wrap, accumulate_grad, options):
    """The gradients after each of some steps of three micro-steps, of which the last reduces them."""
    torch.manual_seed(0)
    model = Model(accumulate_grad)
    match wrap:
        case "ddp":
            wrapped = DistributedDataParallel(model, **options)
        case "fsdp1":
            wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        case "fsdp2":
            wrapped = fully_shard(model)
    found = []
    for step in range(STEPS):
        for micro in range(3):
            torch.manual_seed(100 * step + 10 * micro + rank)
            x, last = torch.randn(12, 16), micro == 2
            here = contextlib.nullcontext()
            if wrap == "ddp":
                wrapped.require_backward_grad_sync = last
            elif wrap == "fsdp2":
                model.set_requires_gradient_sync(last)
            elif not last:
                here = wrapped.no_sync()
            with here:
                wrapped(x).square().sum().backward()
        # A part of a parameter that FSDP1 left another process may be empty and has no gradient
        grads = [p.grad for p in model.parameters() if p.grad is not None or wrap != "fsdp1"]
        grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
        assert any(grad.any() for grad in grads)
        found += [grad.clone() for grad in grads]
        model.zero_grad(set_to_none=step == 0)
    return found


def process(rank, store, wrap, options):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with use_backend("reference"):
        plain = train(rank, wrap, False, options)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours = train(rank, wrap, True, options)
    texts = {str(each.message) for each in said if "accumulate_grad" in str(each.message)}
    assert texts == ({f"moe_experts: accumulate_grad is off where {REFUSED[wrap]}."} if wrap in REFUSED else set())
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    dist.barrier()  # nobody leaves while the other still reduces
    gc.collect()  # wrapped models hold the group in cycles, and its threads must end before the interpreter does
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap,options",
    [
        ("ddp", {}),
        ("ddp", {"gradient_as_bucket_view": True}),
        ("fsdp1", {}),
        ("fsdp1", {"use_orig_params": True}),
        ("fsdp2", {}),
    ],
    ids=["ddp", "ddp-bucket-view", "fsdp1", "fsdp1-original", "fsdp2"],
)
def test_equals_ordinary_accumulation(wrap, options, tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path / "store", wrap, options), nprocs=2)

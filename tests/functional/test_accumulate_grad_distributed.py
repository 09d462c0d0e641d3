"""accumulate_grad with the wrappers of torch.distributed, two processes of gloo on the CPU each."""

import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_kernels import use_backend
from moe_kernels.modules import MoE

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
STEPS = 2


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
    wrapped = DistributedDataParallel(model, **options) if wrap == "ddp" else fully_shard(model)
    found = []
    for step in range(STEPS):
        for micro in range(3):
            torch.manual_seed(100 * step + 10 * micro + rank)
            x, last = torch.randn(12, 16), micro == 2
            if wrap == "ddp":
                wrapped.require_backward_grad_sync = last
            else:
                model.set_requires_gradient_sync(last)
            wrapped(x).square().sum().backward()
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        found += [grad.clone() for grad in grads]
        model.zero_grad(set_to_none=step == 0)
    return found


def process(rank, port, wrap, options):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with use_backend("reference"):
        plain = train(rank, wrap, False, options)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours = train(rank, wrap, True, options)
    refused = any("accumulate_grad is off where DistributedDataParallel" in str(each.message) for each in said)
    assert refused == (wrap == "ddp"), [str(each.message) for each in said]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap,options",
    [("ddp", {}), ("ddp", {"gradient_as_bucket_view": True}), ("fsdp2", {})],
    ids=["ddp", "ddp-bucket-view", "fsdp2"],
)
def test_equals_ordinary_accumulation(wrap, options):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, wrap, options), nprocs=2)

"""topk_route on the GPU at the sizes of real routers: values, graphs, changing T, no host sync, more than 2**31 logits.

Every rule, dtype, tie, NaN, infinity and T = 0 at small sizes: tests/ops/test_topk_route.py, on this GPU too.
"""

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.bench import router
from moe_kernels.bench.measure import capture
from moe_kernels.functional import topk_route
from tests.helpers import bitwise_equal

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
REAL = {name: each._replace(D=256) for name, each in router.ROUTERS.items()}  # no one looks at the product here
LARGEST = {
    "largest": router.Router("largest", 4096, 256, 1024, 32, FP32, "sigmoid", True, 1e-20, 2.5, (8, 4)),
    "largest-softmax": router.Router("largest-softmax", 4096, 256, 1024, 32, BF16, "softmax"),
}
EACH = pytest.mark.parametrize("name", [*REAL, *LARGEST])


def inputs_of(name: str, T: int = 4096) -> router.Inputs:
    return router.inputs_of((REAL | LARGEST)[name]._replace(T=T), "cuda")


def step(inputs, logits, d_weights):
    """Weights, indices and the gradient of the logits."""
    weights, indices = router.choose(inputs, logits)
    return [weights.detach(), indices, *torch.autograd.grad(weights, logits, d_weights)]


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request):
    problem = backends.Problem(torch.device("cuda", 0), FP32, ())
    for op in ("topk_route", "topk_route_bwd"):
        if (reason := backends.why_not(request.param, op, problem)) is not None:
            pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@EACH
@pytest.mark.parametrize("op", router.OPS)
@pytest.mark.parametrize("T", [3, 4099, 16384])
def test_against_reference(poison, backend, name, op, T):
    """With the limits of the benchmarks. 4099 is no multiple of a program's or block's tokens."""
    inputs = inputs_of(name, T)
    assert T == 3 or router.decided(inputs, inputs.logits).float().mean() > 0.9
    router.check(op, inputs, backend)


@EACH
def test_other_token_counts_compile_nothing(monkeypatch, backend, name):
    triton = pytest.importorskip("triton")
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *_, fn, **__: compiled.append(fn.name))
    inputs = inputs_of(name)
    logits = inputs.logits.detach().requires_grad_()
    for T in (4096, 1, 2, 3, 5, 16, 17, 64, 100, 1000, 4095):
        step(inputs, logits[:T], inputs.d_weights[:T])
        assert compiled == [] or T == 4096, f"T = {T} compiled {compiled}"
        compiled.clear()


@EACH
def test_no_host_sync(name):
    inputs = inputs_of(name)
    logits = inputs.logits.detach().requires_grad_()
    step(inputs, logits, inputs.d_weights)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, logits, inputs.d_weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EACH
def test_in_a_graph(name):
    inputs = inputs_of(name)
    logits, d_weights = inputs.logits.clone().requires_grad_(), inputs.d_weights.clone()
    graph, captured = capture(lambda: step(inputs, logits, d_weights))
    for _ in range(2):
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
            d_weights.copy_(torch.randn_like(d_weights))
        for tensor in captured:
            tensor.fill_(-1)
        graph.replay()
        for ours, eager in zip(captured, step(inputs, logits, d_weights)):
            assert bitwise_equal(ours, eager)


@EACH
def test_reruns_are_bitwise_equal(name):
    inputs = inputs_of(name, 16384)
    logits = inputs.logits.detach().requires_grad_()
    first, second = (step(inputs, logits, inputs.d_weights) for _ in range(2))
    assert all(map(bitwise_equal, first, second))


@EACH
def test_bad_logits_still_choose_distinct_experts(poison, name):
    """One logit in ten of the first half is bad, three rows altogether; good rows choose as if they were alone."""
    inputs = inputs_of(name)
    generator = torch.Generator("cuda").manual_seed(0)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], device="cuda", dtype=inputs.logits.dtype)
    kind = torch.randint(0, 30, inputs.logits.shape, device="cuda", generator=generator)
    good = slice(len(kind) // 2, None)
    kind[good] = 3
    logits = torch.where(kind < 3, bad[kind.clamp(max=2)], inputs.logits)
    logits[:3] = bad[:, None]
    _, indices, d_logits = step(inputs, logits.requires_grad_(), inputs.d_weights)
    ids = indices.sort(-1).values
    assert (ids[:, 1:] > ids[:, :-1]).all() and ids.min() >= 0 and ids.max() < inputs.router.E
    _, expected, d_expected = step(inputs, inputs.logits.clone().requires_grad_(), inputs.d_weights)
    assert torch.equal(indices[good], expected[good])
    assert bitwise_equal(d_logits[good], d_expected[good])


@pytest.mark.parametrize("experts,top_k", [(64, 6), (128, 8), (256, 8), (512, 22), (1024, 32)])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_more_equal_logits_than_a_list_holds(poison, experts, top_k, biased, dtype):
    """Whole rows, and 65 and more of the best, among random rows: ties go to the lowest index."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(1000, experts, device="cuda", generator=generator).to(dtype)
    logits[::7] = 0.5
    logits[3::7] = (logits[3::7] > -1).to(dtype)
    logits[5::21] = torch.where(logits[5::21] > 0, torch.inf, logits[5::21])
    bias = torch.arange(experts, device="cuda") % 2 / 4 if biased else None
    _, indices = topk_route(logits, top_k, score_after_topk=True, selection_bias_E=bias)
    choice = logits.float() if bias is None else logits.float() + bias
    assert torch.equal(indices, choice.argsort(dim=-1, descending=True, stable=True)[:, :top_k])


def test_more_than_2_31_logits():
    T, E = 2**21 + 5, 1024
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    logits = torch.empty(T, E, device="cuda", dtype=BF16).normal_().requires_grad_()
    weights, indices = topk_route(logits, 4, renormalize=True)
    d_weights = torch.randn_like(weights)
    (d_logits,) = torch.autograd.grad(weights, logits, d_weights)
    last = logits.detach()[-70:].clone().requires_grad_()
    expected_weights, expected = topk_route(last, 4, renormalize=True)
    assert torch.equal(indices[-70:], expected) and torch.equal(weights[-70:], expected_weights)
    assert torch.equal(d_logits[-70:], torch.autograd.grad(expected_weights, last, d_weights[-70:])[0])

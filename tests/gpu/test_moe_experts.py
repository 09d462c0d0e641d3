"""The whole layer on the GPU, by the backends it picks: values, gradients, streams, threads, devices, no host sync."""

import threading

import pytest
import torch

from moe_kernels import use_backend
from moe_kernels.functional import _row_product, moe_experts, routing_plan, topk_route
from tests.helpers import Case, Problem, assert_close, bitwise_equal, naive_moe

pytestmark = pytest.mark.gpu

NAMES = ("x", "weights", "w_gate_up", "w_down", "bias_gate_up", "bias_down")
CASES = [
    Case(63, 2, 8, 64, 40, block_m=16),
    Case(1, 2, 4, 64, 40, block_m=16),
    Case(0, 2, 4, 64, 40, block_m=16),
    Case(70, 3, 5, 200, 24, routing="sentinels", block_m=16),
    Case(50, 2, 4, 64, 40, routing="all_to_one", block_m=16),
    Case(70, 2, 8, 64, 40, routing="empty", block_m=16),
    Case(40, 4, 3, 64, 40, "relu2", routing="duplicates", block_m=16),
    Case(70, 3, 5, 72, 200, "swiglu_oai", routing="sentinels", block_m=16, interleaved=True),
    Case(63, 2, 8, 64, 40, "swiglu_clamp_before", block_m=16),
]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
BOTH = pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])
MEDIUM = Case(500, 4, 16, 256, 128)


def leaves(p, dtype=None, device=None):
    return [getattr(p, name).detach().clone().to(device, dtype).requires_grad_() for name in NAMES]


def layer(p, inputs, recompute=None, plan=None):
    x, weights, w_gate_up, w_down, bias_gate_up, bias_down = inputs
    return moe_experts(
        x,
        weights,
        p.plan if plan is None else plan,
        w_gate_up,
        w_down,
        activation=p.case.activation,
        bias_gate_up_E2I=bias_gate_up,
        bias_down_ED=bias_down,
        recompute=recompute,
        **dict(zip(("alpha", "limit", "interleaved"), p.case.options)),
    )


def step(p, inputs, recompute=None, plan=None):
    """Output and every gradient."""
    out = layer(p, inputs, recompute, plan)
    return [out, *torch.autograd.grad(out, inputs, p.d_out.to(out))]


@DTYPES
@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_naive_autograd(poison, case, dtype, recompute):
    p = Problem(case, "cuda", dtype)

    def naive(inputs):
        x, weights, w_gate_up, w_down, *biases = inputs
        out = naive_moe(x, weights, p.indices, w_gate_up, w_down, case.activation, *biases, case.interleaved)
        grads = torch.autograd.grad(out, inputs, p.d_out.to(out.dtype), allow_unused=True, materialize_grads=True)
        return [out, *grads]

    truth, plain = naive(leaves(p, torch.float64)), naive(leaves(p))
    for name, ours, true, torchs in zip(("output", *NAMES), step(p, leaves(p), recompute), truth, plain):
        assert_close(ours, true, torchs, name)


@DTYPES
def test_gpt_oss_layout(poison, dtype):
    """Interleaved and transposed: the same numbers, and gradients that lie like their parameters."""
    p = Problem(MEDIUM._replace(activation="swiglu_oai", interleaved=True), "cuda", dtype)
    expected = step(p, leaves(p))
    inputs = leaves(p)
    stored = [w.detach().mT.contiguous().requires_grad_() for w in inputs[2:4]]
    out = layer(p, [*inputs[:2], *(w.mT for w in stored), *inputs[4:]])
    out.backward(p.d_out)
    grads = [inputs[0].grad, inputs[1].grad, *(w.grad.mT for w in stored), inputs[4].grad, inputs[5].grad]
    assert all(w.grad.is_contiguous() for w in stored)
    for name, ours, contiguous in zip(("output", *NAMES), [out, *grads], expected):
        assert_close(ours, contiguous.double(), contiguous, name)


@DTYPES
def test_column_chunks(monkeypatch, dtype):
    """Large products are made a few hundred columns at a time: same results within rounding."""
    p = Problem(MEDIUM, "cuda", dtype)
    whole = step(p, leaves(p))
    monkeypatch.setattr(_row_product, "_chunk_columns", lambda *_: 96)
    for a, b in zip(step(p, leaves(p)), whole):
        assert_close(a, b.double(), b)


def test_autocast_with_float32_parameters():
    p = Problem(MEDIUM, "cuda", torch.float32)
    inputs = leaves(p)
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(p, inputs)
    half = Problem(MEDIUM, "cuda", torch.bfloat16)
    got = [out, *torch.autograd.grad(out, inputs, half.d_out.float())]
    # The truth rounds what autocast rounds: all but the routing weights
    exact = [t if name == "weights" else t.bfloat16() for name, t in zip(NAMES, inputs)]
    with use_backend("reference"):
        truth = step(half, [t.detach().double().requires_grad_() for t in exact])
        plain = step(half, leaves(half))
    for name, ours, true, torchs in zip(("output", *NAMES), got, truth, plain):
        assert ours.dtype == torch.float32, name
        assert_close(ours.bfloat16(), true, torchs, name)


@pytest.mark.parametrize("tokens", [0, 1, 8, 64, 250])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_few_tokens_without_a_gradient(poison, dtype, tokens):
    """As accurate as the same layer with a gradient, whichever op computes it."""
    p = Problem(Case(tokens, 8, 128, 256, 128), "cuda", dtype)
    inputs = leaves(p)
    exact = naive_moe(p.x.double(), p.weights.double(), p.indices, *(t.double() for t in inputs[2:4]), "swiglu",
                      *(t.double() for t in inputs[4:]))  # fmt: skip
    with torch.no_grad():
        assert_close(layer(p, inputs, plan=p.indices), exact, layer(p, inputs, plan=p.plan))


@BOTH
def test_reruns_are_bitwise_equal(recompute):
    p = Problem(MEDIUM, "cuda", torch.bfloat16)
    assert all(bitwise_equal(a, b) for a, b in zip(step(p, leaves(p), recompute), step(p, leaves(p), recompute)))


def test_second_backward_is_refused():
    p = Problem(MEDIUM, "cuda", torch.bfloat16)
    inputs = leaves(p)
    out = layer(p, inputs)
    torch.autograd.grad(out, inputs, p.d_out, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward over the same graph"):
        torch.autograd.grad(out, inputs, p.d_out)


def test_two_backwards_over_offloaded_tensors():
    """Offloading hands back a fresh copy of H each time, so both are right."""
    p = Problem(MEDIUM, "cuda", torch.bfloat16)
    inputs = leaves(p)
    expected = step(p, leaves(p))[1:]
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        out = layer(p, inputs)
    for retain in (True, False):
        got = torch.autograd.grad(out, inputs, p.d_out, retain_graph=retain)
        assert all(bitwise_equal(a, b) for a, b in zip(got, expected))


def test_no_host_sync():
    """Router, plan, experts, backward: nothing waits for the GPU."""
    p = Problem(MEDIUM, "cuda", torch.bfloat16)
    inputs = leaves(p)
    logits = p.x[:, : p.case.E].detach().clone().requires_grad_()

    def run():
        weights, indices = topk_route(logits, p.case.K, renormalize=True)
        plan = routing_plan(indices, p.case.E)
        out = layer(p, [inputs[0], weights, *inputs[2:]], plan=plan)
        torch.autograd.grad(out, [logits, inputs[0], *inputs[2:]], p.d_out)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_stream_and_other_thread():
    """A thread has no context of its own to inherit (Triton keeps its allocator in one), nor the default stream."""
    p = Problem(MEDIUM, "cuda", torch.bfloat16)
    expected, got = step(p, leaves(p)), []

    def work():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            got.extend(step(p, leaves(p)))
        stream.synchronize()

    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(got) == len(expected), "the thread failed: see its traceback above"
    assert all(bitwise_equal(a, b) for a, b in zip(got, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current():
    p, other = Problem(MEDIUM, "cuda:0", torch.bfloat16), Problem(MEDIUM, "cuda:1", torch.bfloat16)
    expected = step(p, leaves(p))
    with torch.cuda.device(0):
        plan = routing_plan(other.indices, p.case.E, block_m=p.case.block_m)
        got = step(other, leaves(other), plan=plan)
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    assert all(bitwise_equal(a.cpu(), b.cpu()) for a, b in zip(got, expected))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_the_kernels(backend):
    p = Problem(MEDIUM, "cuda", torch.bfloat16)

    def whole(indices, *inputs):
        return layer(p, inputs, plan=routing_plan(indices, p.case.E, block_m=p.case.block_m))

    inputs = leaves(p)
    expected = [whole(p.indices, *inputs)]
    expected += torch.autograd.grad(expected[0], inputs, p.d_out)
    torch._dynamo.reset()
    out = torch.compile(whole, fullgraph=True, backend=backend)(p.indices, *inputs)
    for ours, eager in zip([out, *torch.autograd.grad(out, inputs, p.d_out)], expected):
        assert_close(ours, eager.double(), eager)


# accumulate_grad

WEIGHTS = (2, 3)  # of NAMES


def accumulated(p, inputs, transposed=False, **options):
    """``.grad`` of all leaves after three micro-steps."""
    for i in range(3):
        used = [t.mT if transposed and j in WEIGHTS else t for j, t in enumerate(inputs)]
        x, weights, w_gate_up, w_down, bias_gate_up, bias_down = used
        biases = {"bias_gate_up_E2I": bias_gate_up, "bias_down_ED": bias_down}
        out = moe_experts(x, weights, p.plan, w_gate_up, w_down, activation=p.case.activation, **biases, **options)
        out.backward(p.d_out * (i + 1))
    torch.cuda.synchronize()
    return [t.grad for t in inputs]


@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@BOTH
@DTYPES
def test_accumulation_gives_the_bits_of_autograds(dtype, recompute, transposed, poison):
    p = Problem(MEDIUM, "cuda", dtype)
    both = []
    for accumulate_grad in (True, False):
        inputs = leaves(p)
        for j in WEIGHTS if transposed else ():
            inputs[j] = inputs[j].detach().mT.contiguous().requires_grad_()
        both.append(accumulated(p, inputs, transposed, recompute=recompute, accumulate_grad=accumulate_grad))
    assert_accumulated(*both)


def assert_accumulated(found, expected):
    for name, ours, autograds in zip(NAMES, found, expected, strict=True):
        if name == "bias_gate_up":  # a column sum, made beside the product or alone
            assert_close(ours, autograds.double(), autograds, name)
        else:
            assert bitwise_equal(ours, autograds), name


def test_accumulation_allocates_nothing_of_the_weights_size():
    p = Problem(Case(256, 2, 64, 1024, 512, block_m=16), "cuda", torch.bfloat16)
    inputs = leaves(p)
    accumulated(p, inputs, accumulate_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    accumulated(p, inputs, accumulate_grad=True)
    assert torch.cuda.max_memory_allocated() - before < p.w_down.nbytes / 2


def test_accumulation_on_a_side_stream():
    """Whoever calls backward on another stream finds the sums there."""
    p = Problem(MEDIUM, "cuda", torch.bfloat16)
    expected = accumulated(p, leaves(p), accumulate_grad=False)
    inputs, side = leaves(p), torch.cuda.Stream()
    accumulated(p, inputs, accumulate_grad=True)
    for t in inputs:
        t.grad.zero_()
    for i in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            out = moe_experts(
                *inputs[:2],
                p.plan,
                *inputs[2:4],
                activation=p.case.activation,
                bias_gate_up_E2I=inputs[4],
                bias_down_ED=inputs[5],
                accumulate_grad=True,
            )
        torch.cuda.current_stream().wait_stream(side)
        out.backward(p.d_out * (i + 1))
    found = [t.grad.clone() for t in inputs]
    torch.cuda.synchronize()
    assert_accumulated(found, expected)


def test_accumulation_in_a_cuda_graph():
    """Each replay adds to the ``.grad`` that was there at the capture."""
    p = Problem(MEDIUM, "cuda", torch.bfloat16)
    inputs = leaves(p)
    accumulated(p, inputs, accumulate_grad=True)

    def add():
        x, weights, w_gate_up, w_down, *_ = inputs
        out = moe_experts(x, weights, p.plan, w_gate_up, w_down, activation=p.case.activation, accumulate_grad=True)
        out.backward(p.d_out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        add()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add()
    for t in inputs:
        t.grad.zero_()
    for _ in range(2):
        graph.replay()
    replayed = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad.zero_()
    for _ in range(2):
        add()
    assert all(bitwise_equal(a, t.grad) for a, t in zip(replayed, inputs, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_accumulation(backend):
    p = Problem(MEDIUM, "cuda", torch.bfloat16)

    def whole(x, weights, w_gate_up, w_down, accumulate_grad):
        how = {"activation": p.case.activation, "accumulate_grad": accumulate_grad}
        return moe_experts(x, weights, p.plan, w_gate_up, w_down, **how)

    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, backend=backend)
    both = []
    for run, accumulate_grad in ((compiled, True), (whole, False)):
        inputs = leaves(p)[:4]
        for _ in range(3):
            run(*inputs, accumulate_grad).backward(p.d_out)
        both.append([t.grad for t in inputs])
    for ours, eager in zip(*both, strict=True):
        assert_close(ours, eager.double(), eager)

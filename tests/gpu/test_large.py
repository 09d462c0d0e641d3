"""More than 2**31 elements in one tensor: the index of a row or expert times a stride leaves int32. Parts are checked.

Each backend is forced, so no case passes by another one's kernel.
"""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.functional import routing_plan
from tests.gpu import hopper
from tests.helpers import activate, assert_close, bitwise_equal, relative_l2
from tests.tolerances import TIMES_PLAIN

pytestmark = pytest.mark.gpu

T, K, E, D = 2**17, 8, 8, 64
R = T * K  # 2**20 rows
I = 1032  # noqa: E741
N = 2 * I
WIDE = 2056
DTYPE = torch.bfloat16
assert min(R * N, R * WIDE) > 2**31 > R * I, "H is past int32"
#: Of weights [EXPERTS, WIDEST, WIDEST]; every expert has FEW rows, a whole tile and a ragged one.
EXPERTS, WIDEST, FEW = 9, 16392, 129
assert (EXPERTS - 1) * WIDEST**2 > 2**31, "the last expert's are past int32"


@pytest.fixture(scope="module")
def routed():
    """indices, plan, and the rows to look at: first, last, around the 2**31st element, and some between."""
    torch.manual_seed(0)
    indices = torch.rand(T, E, device="cuda").argsort(-1)[:, :K].contiguous()
    plan = routing_plan(indices, E)
    around = 2**31 // WIDE
    rows = torch.tensor([0, 1, *range(0, R, R // 50), around - 1, around, around + 1, R - 2, R - 1], device="cuda")
    yield indices, plan, rows
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def few():
    """The plan of few tokens that all go to every expert, and of the first and the last their rows and tokens."""
    plan = routing_plan(torch.arange(EXPERTS, device="cuda").repeat(FEW, 1), EXPERTS, block_m=128)
    rows = {e: slice(*plan.offsets_E1[e : e + 2].tolist()) for e in (0, EXPERTS - 1)}
    return plan, {e: (of, plan.slots_R[of].long() // EXPERTS) for e, of in rows.items()}


@pytest.fixture(autouse=True)
def _memory():
    """One of these at a time, also when several test processes share the GPU."""
    with open(Path(tempfile.gettempdir()) / "moe_kernels_large_tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 20 * 2**30:
            pytest.skip("needs 20 GiB of free GPU memory")
        yield
        torch.cuda.empty_cache()


@pytest.fixture(params=["triton", "cuda"])
def run(request):
    """``run(op, *arguments)`` on one backend; on a GPU that isn't Hopper the CUDA backend may decline."""

    def forced(op, *arguments):
        try:
            with use_backend(request.param):
                return getattr(torch.ops.moe_kernels, op)(*arguments)
        except RuntimeError as error:
            if backends.DECLINED in str(error) and request.param == "cuda" and hopper.why_not() is not None:
                pytest.skip(str(error))
            raise

    return forced


def normal(*shape, scale=1.0):
    return torch.randn(shape, device="cuda", dtype=DTYPE) * scale


def of_rows(indices, plan, rows):
    """slot, token and expert of sorted rows"""
    slots = plan.slots_R[rows].long()
    return slots, slots // K, indices.flatten()[slots]


def close(actual, formula, *tensors, what="rows"):
    assert_close(actual, formula(*(t.double() for t in tensors)), formula(*tensors), what)


def test_gate_up(routed, run):
    indices, plan, rows = routed
    x, w = normal(T, D), normal(E, N, D, scale=D**-0.5)
    arguments = (plan.offsets_E1, plan.slots_R, plan.tiles_2M, plan.block_m, K, "swiglu", True, True)
    h, a = run("gate_up", x, w, None, *arguments)
    _, tokens, experts = of_rows(indices, plan, rows)

    def product(x, w):
        return (w @ x[:, :, None])[:, :, 0]

    close(h[rows], product, x[tokens], w[experts], what="H")
    close(a[rows], lambda x, w: activate(product(x, w), "swiglu"), x[tokens], w[experts], what="A")


def test_grouped_gemm(routed, run):
    indices, plan, rows = routed
    a, w = normal(R, D), normal(E, WIDE, D, scale=D**-0.5)
    y = run("grouped_gemm", a, w, None, plan.offsets_E1, plan.tiles_2M, plan.block_m, True)
    experts = of_rows(indices, plan, rows)[2]
    close(y[rows], lambda a, w: (w @ a[:, :, None])[:, :, 0], a[rows], w[experts])


def test_grouped_gemm_reads_past_int32(routed, run):
    indices, plan, rows = routed
    a, w = normal(R, WIDE), normal(E, WIDE, D, scale=WIDE**-0.5)
    y = run("grouped_gemm", a, w, None, plan.offsets_E1, plan.tiles_2M, plan.block_m, False)
    experts = of_rows(indices, plan, rows)[2]
    close(y[rows], lambda a, w: (a[:, None] @ w)[:, 0], a[rows], w[experts])


def test_d_activation(routed, run):
    indices, plan, rows = routed
    d_out, w, weights, h = normal(T, D), normal(E, D, I, scale=D**-0.5), normal(T, K), normal(R, N)
    slots, tokens, experts = of_rows(indices, plan, rows)
    inputs = d_out[tokens], w[experts], weights.flatten()[slots, None], h[rows]

    def formula(d_out, w, s, h):
        h = h.detach().requires_grad_()
        a = activate(h, "swiglu")
        d_a = (d_out[:, None] @ w)[:, 0]
        return torch.autograd.grad(a, h, s * d_a)[0], (s * a).detach(), (d_a * a).sum(-1).detach()

    arguments = (plan.offsets_E1, plan.slots_R, plan.tiles_2M, plan.block_m, "swiglu")
    a_scaled, d_weights = run("d_activation_", d_out, w, h, weights, *arguments)
    got = h[rows], a_scaled[rows], d_weights.flatten()[slots].to(DTYPE)
    truth, plain = formula(*(t.double() for t in inputs)), formula(*inputs)
    for name, ours, true, torchs in zip(("dH", "A'", "dS"), got, truth, plain):
        assert_close(ours, true, torchs, name)


def test_grouped_wgrad(routed, run):
    """The last expert's rows lie past the 2**31st element."""
    _, plan, _ = routed
    dh, x = normal(R, N), normal(T, D)
    dw, db = run("grouped_wgrad", dh, x, plan.offsets_E1, plan.slots_R, K, "rhs", True, torch.float32)
    start, end = plan.offsets_E1[-2:].tolist()
    left, right = dh[start:end, -64:], x[plan.slots_R[start:end].long() // K]
    # Tensor cores drop low bits of an fp32 sum over 131072 rows, so the measure is twice plain bf16.
    truth = left.double().T @ right.double()
    assert relative_l2(dw[-1, -64:], truth) < TIMES_PLAIN * relative_l2(left.T @ right, truth)
    assert_close(db[-1, -64:], left.double().sum(0), what="db")


def test_permute(routed, run):
    indices, plan, rows = routed
    x = normal(T, WIDE)
    out = run("permute", x, None, plan.offsets_E1, plan.slots_R, plan.positions_TK)
    assert torch.equal(out[rows], x[of_rows(indices, plan, rows)[1]])


@pytest.mark.parametrize("trans_w", [True, False])
def test_grouped_gemm_of_weights_past_int32(few, run, trans_w):
    plan, of_experts = few
    a, w = normal(FEW * EXPERTS, WIDEST), normal(EXPERTS, WIDEST, WIDEST, scale=WIDEST**-0.5)
    y = run("grouped_gemm", a, w, None, plan.offsets_E1, plan.tiles_2M, plan.block_m, trans_w)
    for e, (rows, _) in of_experts.items():
        last = w[e, -64:].T if trans_w else w[e, :, -64:]
        close(y[rows, -64:], torch.matmul, a[rows], last, what=f"expert {e}")


@pytest.mark.parametrize("gather", ["lhs", "rhs"])
def test_grouped_wgrad_past_int32(few, run, gather):
    """Made, and added to what is there."""
    plan, of_experts = few
    lhs, rhs = (normal(FEW if gather == side else FEW * EXPERTS, WIDEST) for side in ("lhs", "rhs"))
    sides = lhs, rhs, plan.offsets_E1, plan.slots_R, EXPERTS, gather
    dw, _ = run("grouped_wgrad", *sides, False, DTYPE)
    for e, (rows, tokens) in of_experts.items():
        left, right = lhs[tokens if gather == "lhs" else rows, -64:], rhs[tokens if gather == "rhs" else rows]
        close(dw[e, -64:], lambda left, right: left.T @ right, left, right, what=f"expert {e}")
    into = normal(EXPERTS, WIDEST, WIDEST)
    expected = {e: into[e] + dw[e] for e in of_experts}
    run("grouped_wgrad_", *sides, into)
    for e, sums in expected.items():
        assert bitwise_equal(into[e], sums), f"expert {e}"


@pytest.mark.parametrize("op", ["combine", "unpermute"])
def test_sums_over_experts(routed, run, op):
    _, plan, rows = routed
    y, weights = normal(R, WIDE), normal(T, K)
    if op == "combine":
        out = torch.full((T, WIDE), torch.nan, device="cuda", dtype=DTYPE)
        run("combine", out, y, plan.positions_TK, weights, None)
    else:
        out = run("unpermute", y, plan.positions_TK, weights)
    tokens = torch.cat([plan.slots_R[rows].long() // K, torch.tensor([0, T - 1], device="cuda")])
    positions = plan.positions_TK[tokens].long()
    close(out[tokens], lambda y, s: (y * s[:, :, None]).sum(1), y[positions], weights[tokens])

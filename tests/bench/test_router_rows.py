"""The rows of routers in ops.json, and of the block with our router: on the CPU, with a clock that stands still."""

import types

import pytest
import torch
import torch.nn.functional as F

from moe_kernels.bench import block, layer, ops, router
from moe_kernels.bench.layer import FUSED_ROUTER, Inaccurate
from moe_kernels.bench.shapes import SHAPES
from moe_kernels.functional import topk_route
from moe_kernels.integrations.transformers import families

TINY = SHAPES["tiny"]
SMALL = {name: each._replace(T=96, D=64) for name, each in router.ROUTERS.items()}
EACH = pytest.mark.parametrize("name", SMALL)
EACH_OP = pytest.mark.parametrize("op", router.OPS)


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    def in_turn(runs):
        for run in runs.values():
            run()
        return dict(zip(runs, (1.2, 1.0, 3.0, 2.0), strict=True))  # of 40 calls, in ms

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=2**14))
    monkeypatch.setattr(router, "matmul", lambda x, w: x.float() @ w.float().T)
    monkeypatch.setattr(router, "capture", lambda run: (types.SimpleNamespace(replay=run), None))
    monkeypatch.setattr(router, "medians_in_turn_ms", in_turn)
    monkeypatch.setattr(router, "_CALLS", 1)
    monkeypatch.setattr(ops, "graph_us", lambda runs: [run() for run in runs] and 250.0)
    monkeypatch.setattr(ops, "median_ms", lambda run, **_: 0.5 if run() else 0.0)


@EACH_OP
@EACH
def test_rows(session, name, op):
    call, row = router.run(session, SMALL[name], op, "reference")
    call()
    assert list(session.rows["ops.json"]) == [f"op/{op}/{name}/reference"]
    assert row.pop("default_backend") == "reference"
    if op != "router":
        assert row["gpu_us"] == 250 and set(row) == {"gpu_us", "tb_per_s", "of_copy"}
        return
    assert row["over_matmul"] == 1.2 and row["step_over_matmul"] == 1.5
    assert set(row) == {"gpu_us", "matmul_us", "over_matmul", "step_us", "step_over_matmul"}


def test_a_graph_has_every_input_equally_often(monkeypatch):
    monkeypatch.setattr(router, "_CALLS", 4)
    monkeypatch.setattr(router, "medians_in_turn_ms", lambda runs: {name: run() or 12.0 for name, run in runs.items()})
    ran = []
    found = router._in_turn_us({"three": [lambda n=n: ran.append(n) for n in range(3)]})
    assert ran == [0, 1, 2, 0, 1, 2] and found == {"three": 2000}


def test_bytes():
    qwen3, super_ = router.ROUTERS["qwen3-30b"], router.ROUTERS["nemotron-3-super"]
    assert router.OPS["topk_route"].moved(qwen3) == 16384 * (128 * 2 + 8 * (2 + 8))
    assert router.OPS["topk_route_bwd"].moved(qwen3) == 16384 * (2 * 128 * 2 + 8 * (2 + 8))
    assert router.OPS["topk_route"].moved(super_) == 16384 * (512 * 4 + 22 * (4 + 8))
    assert router.OPS["topk_route_bwd"].moved(super_) == 16384 * (512 * 4 + 22 * (4 + 4 + 8))


@EACH
def test_nearly_every_token_is_compared(name):
    inputs = router.inputs_of(SMALL[name]._replace(T=2000), "cpu")
    assert router.decided(inputs, inputs.logits).float().mean() > 0.97


@pytest.mark.parametrize("name, place", [("deepseek-v3", 7), ("nemotron-3-super", 21), ("nemotron-3-super", 5)])
def test_what_a_rounding_decides_is_not_compared(name, place):
    """The scores of two neighbours in the order of choice come within a rounding of each other."""
    inputs = router.inputs_of(SMALL[name], "cpu")
    sure = router.decided(inputs, inputs.logits)
    token = int(sure.nonzero()[3])
    choice = inputs.logits.double().sigmoid() + inputs.bias
    kept = SMALL[name]._replace(K=place + 2)
    better, worse = router.choose(inputs._replace(router=kept), inputs.logits)[1][token, place:].tolist()
    logits = inputs.logits.clone()
    logits[token, worse] = (choice[token, better] - inputs.bias[worse] - 2e-7).logit()
    found = router.decided(inputs, logits)
    assert not found[token] and found[sure.nonzero()[:3, 0]].all()


def wrong(monkeypatch, op, change):
    right = router.OPS[op].run
    monkeypatch.setitem(router.OPS, op, router.OPS[op]._replace(run=lambda inputs: change(*right(inputs))))


@pytest.mark.parametrize("op", ["topk_route", "router"])
def test_a_wrong_choice_has_no_time(session, monkeypatch, op):
    wrong(monkeypatch, op, lambda *found: (*found[:-1], found[-1].flip(1)))
    with pytest.raises(Inaccurate, match=f"op/{op}/deepseek-v3/reference: 9[0-9] tokens have other experts"):
        router.run(session, SMALL["deepseek-v3"], op, "reference")
    assert session.rows == {}


@pytest.mark.parametrize(
    "name, op, place, what",
    [
        ("qwen3-30b", "topk_route", 0, "weights"),
        ("qwen3-30b", "topk_route_bwd", 0, "d_logits"),
        ("qwen3-30b", "router", 0, "logits"),
        ("nemotron-3-super", "router", 0, "logits"),
        ("nemotron-3-super", "router", 1, "weights"),
    ],
)
def test_a_wrong_result_has_no_time(session, monkeypatch, name, op, place, what):
    factor = 1.001 if what == "logits" and name != "qwen3-30b" else 1.02  # what claims fp32 is held to it
    wrong(monkeypatch, op, lambda *found: [t * factor if p == place else t for p, t in enumerate(found)])
    with pytest.raises(Inaccurate, match=f"op/{op}/{name}/reference: {what} have a relative error"):
        router.run(session, SMALL[name], op, "reference")


# The block with our router


def test_the_block_has_our_router_on_its_own_parameters(session):
    tiny = session.layer(TINY)
    stock, ours = tiny.module("block", "moe_kernels").gate, tiny.module("block", FUSED_ROUTER).gate
    assert type(stock) is type(tiny.block.gate) and type(ours) is not type(stock)
    assert ours.weight is stock.weight is tiny.block.gate.weight
    assert type(tiny.module("block", "moe_kernels_recompute").gate) is type(stock)


def test_the_block_with_our_router_runs_it(session, op_counter):
    tiny = session.layer(TINY)
    with op_counter:
        layer.gradients(tiny.forward("block", "uniform", FUSED_ROUTER), tiny.leaves("block", "uniform"), tiny.d_out)
    assert op_counter.calls["topk_route"] == op_counter.calls["topk_route_bwd"] == 1
    errors = tiny.errors("block", "uniform", FUSED_ROUTER)
    assert all(0 < error < 0.02 for error in errors.values())


def give(monkeypatch, tiny, gate):
    """The block with our router has this one instead."""
    module, right = tiny.module("block", FUSED_ROUTER), tiny.module
    module._modules["gate"] = gate
    monkeypatch.setattr(tiny, "module", lambda what, name: module if name == FUSED_ROUTER else right(what, name))


def test_the_truth_takes_our_choice_between_equals(session, monkeypatch):
    tiny = session.layer(TINY)
    weight = tiny.block.gate.weight
    with torch.no_grad():
        weight[1] = weight[0]  # two experts with the same logits

    def highest_index_first(x):
        logits = F.linear(x.reshape(-1, TINY.D), weight)
        weights, indices = topk_route(logits.flip(1), TINY.K, renormalize=True, weights_dtype=logits.dtype)
        return logits, weights, TINY.E - 1 - indices

    give(monkeypatch, tiny, highest_index_first)
    assert not torch.equal(tiny._chosen(False), tiny._chosen(True))
    tiny.errors("block", "uniform", FUSED_ROUTER)
    stock, ours = (tiny._truth("block", "uniform", fused)[3] for fused in (False, True))
    assert layer.relative_l2(ours, stock) > 0.1, "the choices must give different gradients for this to test it"


def test_a_router_that_chooses_worse_has_no_time(session, monkeypatch):
    tiny = session.layer(TINY)
    right = tiny.module("block", FUSED_ROUTER).gate

    def worst_first(x):
        logits, weights, indices = right(x)
        return logits, weights, indices.flip(1)

    give(monkeypatch, tiny, worst_first)
    monkeypatch.setattr(block, "measure", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(Inaccurate, match="chooses experts with other logits"):
        block.run(session, block.Case("block", TINY, "uniform", FUSED_ROUTER))


def test_a_router_that_stays_stock_has_no_time(session, monkeypatch):
    monkeypatch.setattr(families, "swap", lambda model: None)
    tiny = session.layer(TINY)
    with pytest.raises(Inaccurate, match="no rule for the router"):
        tiny.errors("block", "uniform", FUSED_ROUTER)

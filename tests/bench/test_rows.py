"""What is measured, and the rows it becomes: every benchmark once on the CPU, with a clock that stands still."""

import types

import pytest
import torch

from moe_kernels.bench import block, ceilings, decode, extra, layer
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.bench.measure import Measured
from moe_kernels.bench.shapes import ALL_SHAPES, DEFAULT_SHAPES, ROUTINGS, SHAPES
from tests.bench.conftest import PRODUCTS_MS

TINY = SHAPES["tiny"]
MEASURED = Measured(2.0, 5.0, 7.0, 8.0, 300.0, 900.0, 3.0)


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """Everything is called, and takes what the test says."""

    def measure(forward, d_out):
        forward().backward(d_out)
        return MEASURED

    def beside_eager(runs):
        """Eager takes 4 ms, what is compared with it 3."""
        assert len(runs) == 2
        for run in runs.values():
            run()
        return {name: 4.0 if name == "eager" else 3.0 for name in runs}

    def beside_products(runs):
        """Ours takes 2 ms forward and 8 in all; a step on skewed routing 9 beside 6."""
        for run in runs.values():
            run()
        taken = PRODUCTS_MS | {"forward": 2.0, "step": 8.0, "zipf": 9.0, "uniform": 6.0}
        return {name: taken.get(name, 1.0) for name in runs}

    for module in (block, extra):
        monkeypatch.setattr(module, "measure", measure)
    products = ceilings.products
    monkeypatch.setattr(ceilings, "products", lambda shape: products(shape, device="cpu"))
    monkeypatch.setattr(block, "medians_in_turn_ms", beside_products)
    monkeypatch.setattr(extra, "medians_in_turn_ms", beside_eager)
    monkeypatch.setattr(decode, "graph_us", lambda runs: [run() for run in runs] and 250.0)
    monkeypatch.setattr(decode, "capturable", lambda run: True)


# block.json


def names(shape: str, *routings: str) -> set[str]:
    return {case.name for case in block.cases(SHAPES[shape], routings)}


def test_names_of_the_main_shape():
    assert names("qwen3-30b", *ROUTINGS) == {
        *(f"block/qwen3-30b/uniform/{name}" for name in ("eager", "grouped_mm", *layer.OURS)),
        *(
            f"experts/qwen3-30b/{kind}/{name}"
            for kind in ROUTINGS
            for name in ("grouped_mm", "moe_kernels", "moe_kernels_recompute")
        ),
    }


@pytest.mark.parametrize("shape", DEFAULT_SHAPES[1:])
def test_names_of_the_other_shapes(shape):
    found = names(shape, "uniform")
    assert {f"block/{shape}/uniform/grouped_mm", f"experts/{shape}/uniform/moe_kernels"} <= found
    assert not [name for name in found if "triton" in name or "batched_mm" in name]


def test_what_takes_seconds_or_all_memory_is_left_out():
    main, wide = SHAPES["qwen3-30b"], SHAPES["qwen3.5-35b"]
    assert block.left_out(TINY) == []
    assert block.why_left_out("batched_mm", main._replace(T=256), backward=False) is None
    assert [(case.name, reason) for case, reason in block.left_out(main)] == [
        ("block/qwen3-30b/uniform/batched_mm", "left out: it would copy 3456 GiB of weights")
    ]
    reasons = {case.implementation: reason for case, reason in block.left_out(wide)}
    assert set(reasons) == {"eager", "batched_mm"} and "loop over 256 experts" in reasons["eager"]
    assert not {case for case, _ in block.left_out(wide)} & set(block.cases(wide))


def test_block_rows(session):
    for case in block.cases(TINY, ["uniform", "zipf"]):
        step, row = block.run(session, case)
        step()
        assert row["forward_ms"] == 2 and row["step_ms"] == 7 and row["held_mib"] == 300
        assert row["step_tflops"] == pytest.approx(3 * TINY.forward_flops / 7e9, rel=1e-4)
        assert ("step_over_bound" in row) == (case.what == "experts" and case.implementation in layer.OURS)
        assert row.get("step_over_uniform") == (1.5 if case.routing == "zipf" else None)
    rows = session.rows["block.json"]
    bound = rows["bound/tiny"]
    assert bound["step_ms"] == pytest.approx(sum(PRODUCTS_MS.values()) * bound["padding"], rel=1e-2)
    assert rows["experts/tiny/uniform/moe_kernels"]["step_over_bound"] == pytest.approx(8 / bound["step_ms"], rel=1e-3)
    for name in ("eager", "batched_mm"):  # whole blocks; those with a row of experts have the errors of that
        assert set(rows[f"error/tiny/{name}"]) == {"out", "dx", "d_router", "dw_gate_up", "dw_down"}
    for name in block.EXPERTS:
        assert set(rows[f"error/tiny/{name}"]) == {"out", "dx", "d_weights", "dw_gate_up", "dw_down"}
        assert all(0 < error < 0.02 for error in rows[f"error/tiny/{name}"].values())


@pytest.mark.parametrize("what", ["block", "experts"])
def test_a_wrong_result_has_no_time(session, monkeypatch, what):
    monkeypatch.setattr(block, "measure", lambda *_: pytest.fail("it was timed"))
    right = layer.gradients

    def two_percent_off(forward, leaves, d_out):
        out, dx, *rest = right(forward, leaves, d_out)
        return [out, dx * 1.02, *rest]

    case = block.Case(what, TINY, "uniform", "moe_kernels")
    session.layer(TINY).errors(what, "uniform", "grouped_mm")  # the truth is kept from here on
    monkeypatch.setattr(layer, "gradients", two_percent_off)
    with pytest.raises(Inaccurate, match=rf"{what}/tiny/uniform/moe_kernels: relative error of dx is 2.*, allowed"):
        block.run(session, case)
    assert session.rows == {}


def test_where_stock_cannot_run_plain_torch_is_the_yardstick(session, monkeypatch):
    tiny, right = session.layer(TINY), layer.Layer.module

    def module(self, what, implementation):
        if implementation == layer.YARDSTICK:
            raise torch.OutOfMemoryError("out of memory")
        return right(self, what, implementation)

    monkeypatch.setattr(layer.Layer, "module", module)
    errors = tiny.errors("experts", "uniform", "moe_kernels")
    assert tiny._yardstick("experts", "uniform") == errors, "ours is plain torch, too, on a CPU"


def test_implementations_share_parameters_and_nothing_else(session):
    tiny = session.layer(TINY)
    ours, stock = tiny.module("block", "moe_kernels"), tiny.module("block", "eager")
    assert ours.experts.gate_up_proj is stock.experts.gate_up_proj is tiny.block.experts.gate_up_proj
    chosen = [module.experts.config._experts_implementation for module in (ours, stock, tiny.block)]
    assert chosen == ["moe_kernels", "eager", "grouped_mm"]


def test_a_peer_that_cannot_run_gives_its_reason(session, monkeypatch):
    answers = iter([{"reason": "first call not finished in 150 s"}, {"block/tiny/uniform/liger": {"step_ms": 9.0}}])
    asked = []
    monkeypatch.setattr(block.peers, "measure_peer", lambda *asks: asked.append(asks) or next(answers))
    assert block.run_peer(session, TINY, "liger", 150) == "first call not finished in 150 s"
    assert session.rows == {} and asked == [("liger", TINY, 150)]
    assert block.run_peer(session, TINY, "liger") is None
    assert session.find("block.json", "block/tiny/uniform/liger") == {"step_ms": 9.0}


def test_a_peer_that_is_stopped_after_its_forward_has_a_row_with_the_reason(session, monkeypatch):
    answer = {"block/tiny/uniform/liger": {"forward_ms": 9.0}, "reason": "first call not finished in 150 s"}
    monkeypatch.setattr(block.peers, "measure_peer", lambda *_: answer)
    assert block.run_peer(session, TINY, "liger") == "first call not finished in 150 s"
    row = {"forward_ms": 9.0, "reason": "first call not finished in 150 s"}
    assert session.rows["block.json"] == {"block/tiny/uniform/liger": row}


def test_every_shape_has_stock_beside_ours():
    by_default = {case.name for name in DEFAULT_SHAPES for case in block.cases(SHAPES[name])}
    for shape in map(SHAPES.get, ALL_SHAPES):
        *before, ours = (case.name for case in block.on_every_shape(shape))
        assert ours == f"experts/{shape.name}/uniform/moe_kernels"
        stock = f"experts/{shape.name}/uniform/grouped_mm"
        assert before == ([] if stock in by_default else [stock])


def test_stock_that_lacks_the_memory_has_a_row_with_the_reason(session, monkeypatch):
    def measure(forward, d_out):
        forward().backward(d_out)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    stock, ours = block.on_every_shape(TINY)
    assert block.run_if_it_fits(session, ours)[1]["step_ms"] == 7
    monkeypatch.setattr(block, "measure", measure)
    reason = block.run_if_it_fits(session, stock)
    assert reason == "out of memory: CUDA out of memory."
    assert session.find("block.json", stock.name) == {"reason": reason}
    assert all(leaf.grad is None for leaf in session.layer(TINY).leaves("experts", "uniform"))
    with pytest.raises(torch.OutOfMemoryError):
        block.run_if_it_fits(session, ours)


# decode.json


def test_decode_rows(session, monkeypatch):
    times = {"grouped_mm": 0.4, "batched_mm": 0.2, "eager": 1.0, "moe_kernels": 0.1}
    monkeypatch.setattr(decode, "wall_ms", lambda runs: {name: times[name] for name in runs})
    call, row = decode.run(session, TINY, 8)
    call()
    assert row == {"forward_ms": 0.1, "gpu_ms": 0.25, "over_best_stock": 0.5}
    assert set(session.rows["decode.json"]) == {f"decode/tiny/T8/{name}" for name in times}


def test_stock_that_waits_for_the_gpu_has_no_gpu_time(session, monkeypatch):
    monkeypatch.setattr(decode, "wall_ms", lambda runs: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(decode, "capturable", lambda run: False)
    decode.run(session, TINY, 1)
    rows = session.rows["decode.json"]
    assert [name for name, row in rows.items() if "gpu_ms" in row] == ["decode/tiny/T1/moe_kernels"]


@pytest.mark.parametrize(
    "name, scale, place, word",
    [
        ("moe_kernels", 1.02, decode._INPUTS - 1, "moe_kernels: relative error 2.* on input 7, allowed"),
        ("eager", -1, 0, "eager: relative error 2.0.* on input 0, allowed 1.00e-01"),
    ],
)
def test_few_tokens_that_are_wrong_have_no_time(session, monkeypatch, name, scale, place, word):
    monkeypatch.setattr(decode, "wall_ms", lambda runs: pytest.fail("it was timed"))
    right, calls = layer.Layer.module, []

    def module(self, what, implementation):
        run = right(self, what, implementation)
        if implementation != name:
            return run

        def wrong_once(*inputs):
            calls.append(None)
            return run(*inputs) * (scale if len(calls) == place + 1 else 1)

        return wrong_once

    monkeypatch.setattr(layer.Layer, "module", module)
    with pytest.raises(Inaccurate, match=f"decode/tiny/T8/{word}"):
        decode.run(session, TINY, 8)
    assert session.rows == {}


# extra.json


def test_autocast_rows(session):
    for implementation in ("grouped_mm", "moe_kernels"):
        step, row = extra.run_autocast(session, TINY, implementation)
        step()
    assert row["over_bf16"] == 1 and row["step_ms"] == 7
    assert set(session.rows["extra.json"]) == {"autocast/tiny/grouped_mm", "autocast/tiny/moe_kernels"}
    assert set(session.rows) == {"extra.json"}, "the bf16 step beside it is no row"


@pytest.mark.parametrize("factor", [1, 2], ids=["equal", "different"])
def test_graph_rows(session, monkeypatch, factor):
    def capture(run):
        outputs = run()

        def replay():
            for old, new in zip(outputs, run()):
                old.copy_(new * factor)

        return types.SimpleNamespace(replay=replay), outputs

    monkeypatch.setattr(extra, "capture", capture)
    if factor == 1:
        assert extra.run_graph(session, TINY)[1] == {"step_ms": 3.0, "eager_step_ms": 4.0, "over_eager": 0.75}
    else:
        with pytest.raises(Inaccurate, match="differ from eager"):
            extra.run_graph(session, TINY)


@pytest.mark.parametrize("implementation", extra.ON_THE_HOST)
def test_host_rows(session, monkeypatch, implementation):
    graphs = []
    times = iter([100.0, 200.0, 700.0])
    monkeypatch.setattr(extra, "host_us", lambda run: graphs.append(run()) or next(times))
    step, row = extra.run_host(session, TINY, implementation)
    step()
    assert row == {"forward_no_grad_us": 100, "forward_us": 200, "step_us": 700}
    no_grad, forward, gradients = graphs
    assert forward.requires_grad and not no_grad.requires_grad and len(gradients) == len(layer.NAMES["block"])
    assert set(session.rows["extra.json"]) == {f"host/tiny/{implementation}"}


def test_a_wrong_block_has_no_time_of_the_host(session, monkeypatch):
    def refuse(*_):
        raise Inaccurate("wrong")

    monkeypatch.setattr(layer.Layer, "errors", refuse)
    monkeypatch.setattr(extra, "host_us", lambda run: pytest.fail("it was timed"))
    with pytest.raises(Inaccurate, match="wrong"):
        extra.run_host(session, TINY, "moe_kernels")
    assert session.rows == {}


def test_compile_rows(session, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: compile_(module, fullgraph=True, backend="eager"))
    row = extra.run_compile(session, TINY)[1]
    assert (row["step_ms"], row["over_eager"], row["peak_over_eager"]) == (7, 0.75, 1)
    row = extra.run_compile_accumulate(session, TINY)[1]
    assert (row["step_ms"], row["over_eager"], row["peak_over_eager"], row["peak_over_plain_eager"]) == (7, 0.75, 1, 1)

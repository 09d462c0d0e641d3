"""The rows of ops.json on the CPU, with a clock that stands still: what is checked, timed and said of each op."""

import types
import weakref

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.bench import ceilings, ops
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.bench.shapes import OTHERS, SHAPES, Kind
from tests.bench.conftest import PRODUCTS_MS

TINY = SHAPES["tiny"]


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """Everything is called, and takes what the test says."""

    def in_turn(runs, repeats, prepare):
        """The op, which finds its input as it was, takes 0.4 ms and on CUDA 0.2, its product 0.3."""
        found = []
        for _ in range(2):
            prepare()
            found += [[tensor.clone() for tensor in runs[name]()] for name in runs if name in backends.ORDER]
        assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
        (product,) = runs.keys() - set(backends.ORDER)
        runs[product]()
        return dict.fromkeys(runs, 0.4) | {product: 0.3} | ({"cuda": 0.2} if "cuda" in runs else {})

    monkeypatch.setattr(ops, "graph_us", lambda runs: [run() for run in runs] and 250.0)
    monkeypatch.setattr(ops, "median_ms", lambda run, **_: 0.5 if run() else 0.0)
    monkeypatch.setattr(ops, "medians_in_turn_ms", in_turn)


@pytest.fixture
def l2(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=2**20))


@pytest.mark.parametrize("name", ops.OPS)
def test_op_rows(session, l2, name):
    call, row = ops.run(session, TINY, name, "reference")
    call()
    product = ops.OPS[name].product
    assert row["gpu_us"] == (400 if product else 250)
    if product:
        padding = ceilings.padding(ops.inputs_of(TINY, "cpu").plan.tokens_per_expert_E)
        assert row["of_bmm"] == pytest.approx(0.3 / 0.4 * padding, rel=1e-4)
    assert row["default_backend"] == "reference"
    assert set(row) == {"gpu_us", "default_backend", *(("tflops", "of_bmm") if product else ("tb_per_s", "of_copy"))}
    assert list(session.rows["ops.json"]) == [f"op/{name}/tiny/reference"]


KINDS = {
    "qwen3": Kind(),
    "gpt-oss": OTHERS["gpt-oss-20b"].kind,
    "nemotron": OTHERS["nemotron-3-ultra"].kind,
}


@pytest.fixture
def both(monkeypatch):
    """The backends of a GPU, which are the reference here; ``both`` are those that were used."""
    used = []

    def use(name):
        used.append(name)
        return use_backend(name and "reference")

    monkeypatch.setattr(ops, "use_backend", use)
    monkeypatch.setattr(ops, "default_backend", lambda op, inputs: "cuda")
    yield used
    ops.forget()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ops.ROW_PRODUCTS)
def test_row_products_on_both_backends_in_turn(session, both, name, kind):
    shape = TINY._replace(name="of-a-kind", kind=kind)
    call, default = ops.run_in_turn(session, shape, name)
    call()
    rows = session.rows["ops.json"]
    assert list(rows) == [f"op/{name}/of-a-kind/triton", f"op/{name}/of-a-kind/cuda"]
    assert {"triton", "cuda"} <= set(both)
    triton, cuda = rows.values()
    assert cuda is default
    assert (triton["gpu_us"], cuda["gpu_us"]) == (400, 200)
    assert cuda["of_bmm"] == pytest.approx(2 * triton["of_bmm"], rel=1e-4)
    wide = {"gate_up": shape.N, "grouped_gemm_dx": shape.N}.get(name, shape.I)
    assert triton["tflops"] == pytest.approx(2 * shape.rows * shape.D * wide / 0.4e9, rel=1e-4)
    for each in (triton, cuda):
        assert set(each) == {"gpu_us", "tflops", "of_bmm", "default_backend", "tokens"}
        assert (each["default_backend"], each["tokens"]) == ("cuda", TINY.T)


def test_a_backend_that_cannot_run_a_row_product_has_no_row(session, monkeypatch):
    monkeypatch.setattr(ops, "BACKENDS", ("reference", "cuda"))
    if torch.cuda.is_available():
        pytest.skip("a GPU can")
    row = ops.run_in_turn(session, TINY, "gate_up")[1]
    assert session.rows["ops.json"] == {"op/gate_up/tiny/reference": row}
    op, inputs = ops.OPS["gate_up"], ops.inputs_of(TINY, "cpu")
    assert "cuda: " in ops.declined(op, inputs, "cuda")

    def broken(inputs):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.declined(op._replace(run=broken), inputs, "cuda")


def test_a_row_product_that_is_wrong_on_one_backend_has_no_time(session, both, monkeypatch):
    op = ops.OPS["grouped_gemm_dx"]

    def run(inputs):
        (y,) = op.run(inputs)
        return (y * 1.02 if both[-1] == "cuda" else y,)

    monkeypatch.setitem(ops.OPS, "grouped_gemm_dx", op._replace(run=run))
    monkeypatch.setattr(ops, "medians_in_turn_ms", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(Inaccurate, match="op/grouped_gemm_dx/tiny/cuda: result 0 has a relative error"):
        ops.run_in_turn(session, TINY, "grouped_gemm_dx")
    assert session.rows == {}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_inputs_are_laid_out_as_the_kind_says(kind, l2):
    shape = TINY._replace(kind=kind)
    inputs = ops.inputs_of(shape, "cpu")
    assert inputs.w_gate_up.shape == (shape.E, shape.N, shape.D) and inputs.w_down.shape == (shape.E, shape.D, shape.I)
    assert {w.stride(1) == 1 for w in (inputs.w_gate_up, inputs.w_down)} == {kind.transposed}
    assert inputs.h.shape == inputs.dh.shape == (shape.rows, shape.N) and inputs.a.shape == (shape.rows, shape.I)
    biases = [None if bias is None else bias.shape for bias in (inputs.bias_gate_up, inputs.bias_down)]
    assert biases == ([(shape.E, shape.N), (shape.E, shape.D)] if kind.biases else [None, None])
    assert len(ops.cold(inputs, ops.OPS["gate_up"].reads[1:])) >= 1


def test_what_was_kept_goes_before_another_is_made():
    made = []

    @ops._last
    def make(name):
        assert [each for each in made if each() is not None] == []
        result = set()
        made.append(weakref.ref(result))
        return result

    assert make("a") is make("a")
    make("b")
    make.forget()
    make("b")
    assert len(made) == 3


def test_what_an_op_leaves_unwritten_is_poisoned(session, l2, monkeypatch):
    right, memory = ops.OPS["permute"].run, []

    def all_but_the_first(inputs):
        """Its result is always in the same memory, as an allocator may give it."""
        (rows,) = right(inputs)
        memory.append(memory[0] if memory else rows.clone())
        memory[0][1:] = rows[1:]
        return (memory[0],)

    monkeypatch.setitem(ops.OPS, "permute", ops.OPS["permute"]._replace(run=all_but_the_first))
    with pytest.raises(Inaccurate, match="op/permute/tiny/reference: result 0 has a relative error of nan"):
        ops.check("permute", TINY, "cpu", "reference")
    ops.forget()


def test_the_default_backend_of_an_op_is_what_its_arguments_ask_for(monkeypatch):
    """Also where another backend is forced. Here Triton says that it can run everything but rows of bf16."""
    asked, resolve, inputs = [], backends._resolve.__wrapped__, ops.inputs_of(TINY, "cpu")

    def why_not(backend, op, problem):
        asked.append((op, problem))
        return None if backend == "triton" or op == "grouped_wgrad" else f"not on {backend}"

    def pick(op, problem, forced):
        choice = resolve(op, problem, "reference")  # which runs it
        why = [backend for backend in backends.ORDER if why_not(backend, op, problem) is None]
        return choice._replace(backend=forced or why[0])

    monkeypatch.setattr(backends, "_resolve", pick)
    with use_backend("reference"):
        found = {name: ops.default_backend(ops.OPS[name], inputs) for name in ("gate_up", "grouped_wgrad_down")}
    assert found == {"gate_up": "triton", "grouped_wgrad_down": "cuda"}
    assert asked[0][0] == "gate_up" and asked[0][1].block_m == inputs.plan.block_m


def test_every_product_of_the_bound_is_an_op():
    assert {op.product for op in ops.OPS.values()} - {None} == PRODUCTS_MS.keys()


def test_an_op_that_is_wrong_has_no_time(session, l2, monkeypatch):
    truth, limits = ops._expected("combine", TINY, "cpu")
    monkeypatch.setattr(ops, "_expected", lambda *_: ([tensor * 1.02 for tensor in truth], limits))
    with pytest.raises(Inaccurate, match="op/combine/tiny/reference: result 0 has a relative error"):
        ops.run(session, TINY, "combine", "reference")
    assert session.rows == {}


def test_what_combine_leaves_unwritten_is_found(session, l2, monkeypatch):
    ops._expected("combine", TINY, "cpu")
    right = ops.OPS["combine"].run

    def all_but_the_first(inputs):
        (out,) = right(inputs._replace(out=None))
        inputs.out[1:] = out[1:]
        return (inputs.out,)

    monkeypatch.setitem(ops.OPS, "combine", ops.OPS["combine"]._replace(run=all_but_the_first))
    with pytest.raises(Inaccurate, match="op/combine/tiny/reference: result 0 has a relative error of nan"):
        ops.run(session, TINY, "combine", "reference")


def test_a_plan_that_is_wrong_has_no_time(session, l2, monkeypatch):
    truth, limits = ops._expected("routing_plan", TINY, "cpu")
    slots = truth[1].flip(0)
    monkeypatch.setattr(ops, "_expected", lambda *_: ([truth[0], slots, *truth[2:]], limits))
    with pytest.raises(Inaccurate, match="op/routing_plan/tiny/reference: result 1 is wrong"):
        ops.run(session, TINY, "routing_plan", "reference")


def test_a_backend_that_cannot_run_says_why(session):
    assert "cpu" in ops.why_not(session, TINY, "gate_up", "triton") or torch.cuda.is_available()

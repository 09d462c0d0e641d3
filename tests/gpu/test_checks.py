"""The soak without a GPU: what its cases are, that they hold on the reference backend, and what becomes of outcomes."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import use_backend
from tests import helpers
from tests.gpu import checks, hopper, soak, soak_router
from tests.gpu.soak import CHUNK, FEW, FULL, KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_is_a_case(kind):
    assert [soak.draw(kind, n) for n in range(50)] == [soak.draw(kind, n) for n in range(50)]
    assert len({str(soak.draw(kind, n)) for n in range(FULL)}) > 0.9 * FULL


def test_a_soak_has_everything_in_it():
    drawn = [soak.draw("hopper", n) for n in range(FULL)]
    cases, ways = [d.case for d in drawn], [d.how for d in drawn]
    of_a_call = {(c.activation, c.interleaved, w.transposed, w.bias, w.stored) for c, w in zip(cases, ways)}
    switches = (helpers.LAYOUTS, (False, True), (False, True), ("both", "h", "a"))
    assert of_a_call == {(*layout, *rest) for layout, *rest in itertools.product(*switches)}
    assert {c.routing for c in cases} == set(helpers.SKEWED)
    assert {(w.wgrad_dtype, w.sums, w.ungathered, w.accumulate) for w in ways} == set(
        itertools.product((torch.bfloat16, torch.float32), *[(False, True)] * 3)
    )
    assert {w.weights_dtype for w in ways} == {torch.bfloat16, torch.float32, torch.float16}
    assert {c.T % 128 for c in cases} >= {0, 1, 127} and min(c.T for c in cases) == 1
    assert any(c.K > c.E for c in cases) and max(c.E for c in cases) > 190 and max(c.D for c in cases) == 2048
    assert all(c.D % 64 == 0 and c.I % 8 == 0 and c.block_m == 128 for c in cases)


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_have_every_combination_of_their_switches(kind):
    drawn = [soak.draw(kind, n) for n in range(FULL)]
    match kind:
        case "routing_plan":
            assert len({(d.ids, d.case.block_m, d.case.routing) for d in drawn}) == 2 * 4 * len(helpers.SKEWED)
            assert max(d.case.T * d.case.K for d in drawn) > 16 * 2048, "more blocks than a handful sort them"
        case "permute" | "unpermute":
            assert len({(d.dtype, d.weights, d.sliced) for d in drawn}) == 3 * 3 * 2
            assert {d.case.routing for d in drawn} == set(helpers.SKEWED) and min(d.case.T for d in drawn) == 0
        case "combine":
            assert len({(d.dtype, d.weights, d.residual, d.sliced) for d in drawn}) == 3 * 3 * 3 * 2
        case "decode_experts":
            assert {(d.case.activation, d.case.interleaved, d.dtype, d.bias) for d in drawn} == {
                (*layout, *rest)
                for layout, *rest in itertools.product(helpers.LAYOUTS, (torch.bfloat16, torch.float16), (False, True))
            }
            assert max(d.case.T * d.case.K for d in drawn) <= 2048
        case "topk_route":
            rules = {(d.scoring, d.after, d.bias_dtype is None, d.num_groups > 1, d.rounds) for d in drawn}
            assert len(rules) == 3 * 2**4
            numbers = {(d.renormalize, d.min_sum, d.soft_cap, d.weights_dtype) for d in drawn}
            assert len(numbers) == 2 * 3 * 3 * 3
            of_groups = {(d.group_score, d.losers_zero, d.num_groups) for d in drawn if d.bias_dtype is not None}
            assert len(of_groups) == 2 * 2 * 5 and {d.dtype for d in drawn} == {soak.BF16, soak.FP16, soak.FP32}
            assert max(d.E for d in drawn) > 1000 and max(d.K for d in drawn) == 32
            assert any(d.K == d.E for d in drawn) and any(d.E == d.num_groups > 1 for d in drawn)


def decided(logits, dtype=torch.float32, **changed):
    """Which tokens with these logits have experts that hang on no rounding; a sigmoid with a bias of zeros."""
    logits = torch.tensor(logits, dtype=dtype)
    case = soak.draw("topk_route", 0)._replace(E=logits.shape[1], K=2, dtype=dtype, bias_dtype=torch.float32)
    plain = {"scoring": "sigmoid", "after": False, "num_groups": 1, "top_groups": 1, "soft_cap": 0.0}
    case = case._replace(**plain | {"round_scores": False} | changed)
    bias = None if case.bias_dtype is None else torch.zeros(logits.shape[1])
    inputs = soak_router.Inputs(logits, bias, logits[:, :2])
    with use_backend("reference"):
        return soak_router.decided(case, inputs, soak_router.forward(case, inputs)[1]).tolist()


def test_a_choice_that_hangs_on_a_rounding_is_not_compared():
    apart, near, tie = [0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.400001, 0.2], [0.5, 0.3, 0.3, 0.1]
    behind = [0.5, 0.4, 0.1, 0.100001]
    assert decided([apart, near, tie, behind]) == [True, False, False, True]
    assert decided([apart, near, tie, behind], bias_dtype=None) == [True] * 4, "logits are compared as they are"
    assert decided([apart, near, tie, behind], after=True) == [True] * 4, "a sum of the same two numbers"
    # Scores of bf16 numbers that round to one and the same bf16 number tie exactly: the lower index is better.
    assert decided([[4.0, 3.984375, 3.0, 2.0]], torch.bfloat16, round_scores=True) == [True]
    groups = {"num_groups": 2, "top_groups": 1, "group_score": "max"}
    assert decided([apart, [0.5, 0.4, 0.500001, 0.2]], bias_dtype=None, **groups) == [True, False]


def test_nearly_every_token_of_a_router_is_compared():
    drawn = [(n, soak.draw("topk_route", n)) for n in range(150)]
    shares = []
    for n, case in drawn:
        if case.T * case.E < 5e4:
            inputs = soak_router.inputs_of(case, n, "cpu")
            with use_backend("reference"):
                found = soak_router.decided(case, inputs, soak_router.forward(case, inputs)[1])
            shares.append(found.float().mean().item())
    assert len(shares) > 50 and sum(shares) / len(shares) > 0.97 and min(shares) > 0.5


def work(drawn) -> int:
    """Multiplications, about."""
    if not hasattr(drawn, "case"):
        return 100 * drawn.T * drawn.E
    case = drawn.case
    return (case.T * case.K + 10 * case.E) * max(case.N * case.D, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_cases_hold_on_the_reference_backend(kind, poison):
    """The formulas, their tolerances and the reruns; of results that are a handful of numbers, luck decides here."""
    numbers = [
        n for n in range(1000) if work(drawn := soak.draw(kind, n)) < 1e7 and (kind != "hopper" or drawn.case.T > 40)
    ]
    outcome = soak.run(kind, numbers[:12], "cpu", "reference")
    assert outcome == soak.Outcome(kind, 12, 0, [])


class Waits(TorchDispatchMode):
    """Collects the ops that would wait for a GPU, but for the one copy at the end."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        masked = any(each is not None and each.dtype == torch.bool for each in indices)
        if masked or name in ("_local_scalar_dense", "equal", "nonzero", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "routing_plan"]
)  # is compared on the host, where it was copied
def test_a_case_waits_for_the_gpu_once(kind):
    numbers = [n for n in range(200) if work(soak.draw(kind, n)) < 1e7][:6]
    with Waits() as waits:
        assert soak.run(kind, numbers, "cpu", "reference").cases == 6
    assert waits.found == []


def test_numbers_that_gradients_are_added_to():
    numbers = hopper.there(torch.empty(300, 1000))
    assert numbers.min() >= -2 and numbers.max() < 2 and numbers.mean().abs() < 0.01
    assert len(numbers.unique()) == numbers.numel() and (numbers * 2**21 % 1 != 0).any(), "fewer bits than fp32 has"
    assert torch.equal(hopper.there(torch.empty(300, 1000, dtype=torch.bfloat16)), numbers.bfloat16())


def test_a_failure_names_its_case_and_the_others_go_on(monkeypatch):
    def check(drawn, number, device, backend):
        assert number != 7, "too far off"

    monkeypatch.setitem(KINDS, "combine", KINDS["combine"]._replace(check=check))
    outcome = soak.run("combine", range(5, 10), "cpu", "reference")
    (failure,) = outcome.failures
    assert outcome.cases == 5 and failure.startswith("combine-7: AssertionError: too far off") and "Case(" in failure


def test_a_broken_gpu_ends_a_chunk(monkeypatch):
    def check(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(KINDS, "combine", KINDS["combine"]._replace(check=check))
    outcome = soak.run("combine", range(5), "cpu", "reference")
    assert outcome.cases == 0 and len(outcome.failures) == 1


@pytest.mark.parametrize("cases", [1, CHUNK, CHUNK + 1, FEW, FULL])
def test_chunks_are_all_cases_once(cases):
    chunks = soak.chunks("combine", cases)
    assert [n for _, numbers in chunks for n in numbers] == list(range(cases))
    assert all(len(numbers) <= CHUNK for _, numbers in chunks)


def outcome(kind="hopper", cases=1000, declined=0, failures=()):
    return "soak", soak.Outcome(kind, cases, declined, list(failures))._asdict()


def watched(part, errors=0, tool="memcheck"):
    of = {"tool": tool, "part": part, "parts": 2, "version": "2026.4.0.0"}
    return "sanitizer", of | {"errors": errors, "calls": 100, "seconds": 20.25}


def test_rows():
    found = [outcome(), watched("a"), outcome(failures=["hopper-1234: off"]), ("else", 3), watched("b")]
    found += [outcome("topk_route", 900), outcome("topk_route", 500, declined=600), outcome("combine", 1999)]
    rows, notes = checks.rows_of(found, FULL)
    asked = {"first_case": 0, "last_case": 1999}
    assert rows == {
        "sanitizer/memcheck": {"errors": 0, "calls": 200, "seconds": 40.5, "version": "2026.4.0.0"},
        "soak/hopper": {"cases": 2000, "declined": 0, "failures": 1} | asked,
        "soak/topk_route": {"cases": 1400, "declined": 600, "failures": 0} | asked,
        "soak/combine": {"cases": 1999, "declined": 0, "failures": 0} | asked,
    }
    assert notes == ["soak/combine: 1999 cases, 0 failures; 2000 make a soak"]


@pytest.mark.parametrize("asked", [FEW, FULL - 1])
def test_less_than_a_soak_is_no_row(asked):
    rows, notes = checks.rows_of([outcome(cases=asked)], asked)
    assert rows == {} and notes == [f"soak/hopper: {asked} cases, 0 failures; 2000 make a soak"]


def test_a_tool_has_a_row_when_all_parts_were_watched_or_one_is_not_clean():
    found = [watched("a"), watched("a", tool="racecheck"), watched("b", 3), watched("b", 2, "initcheck")]
    rows, notes = checks.rows_of(found, FEW)
    assert rows == {
        "sanitizer/memcheck": {"errors": 3, "calls": 200, "seconds": 40.5, "version": "2026.4.0.0"},
        "sanitizer/initcheck": {"errors": 2, "calls": 100, "seconds": 20.2, "version": "2026.4.0.0"},
    }
    assert notes == [f"sanitizer/{t} in 1 parts; 2 make a row" for t in ("racecheck: 0 errors", "initcheck: 2 errors")]

"""The soak without a GPU: what its cases are, that they hold on the reference backend, and what becomes of outcomes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import helpers
from tests.gpu import checks, soak
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
            assert len({(d.scoring, d.biased, d.groups, d.dtype) for d in drawn}) == 3 * 5 * 2


def work(drawn) -> int:
    """Multiplications, about."""
    if not hasattr(drawn, "case"):
        return drawn.T * drawn.E * drawn.D
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


def test_rows():
    sanitizer = "sanitizer", {"tool": "memcheck", "errors": 0, "calls": 200, "seconds": 40.0}
    found = [outcome(), sanitizer, outcome(failures=["hopper-1234: off"]), ("else", 3)]
    found += [outcome("topk_route", 900), outcome("topk_route", 500, declined=600), outcome("combine", 1999)]
    rows, notes = checks.rows_of(found, FULL)
    assert rows == {
        "sanitizer/memcheck": {"errors": 0, "calls": 200, "seconds": 40.0},
        "soak/hopper": {"cases": 2000, "declined": 0, "failures": 1, "first_case": 0, "last_case": 1999},
        "soak/topk_route": {"cases": 1400, "declined": 600, "failures": 0, "first_case": 0, "last_case": 1999},
    }
    assert notes == ["soak/combine: 1999 cases, 0 failures; 2000 make a row"]


@pytest.mark.parametrize("asked", [FEW, FULL + 1])
def test_less_than_a_soak_is_no_row(asked):
    assert checks.rows_of([outcome(cases=FULL if asked > FULL else FEW)], asked)[0] == {}


CONFTEST = """
import pathlib
from moe_kernels.bench import results
from tests.gpu.conftest import *

results.results_dir = lambda: pathlib.Path(__file__).parent
"""
TESTS = """
import pytest
from tests.gpu import soak

@pytest.mark.parametrize("kind,numbers", [c for kind in ("combine", "hopper") for c in soak.chunks(kind, 2000)])
def test_it(kind, numbers, record_property):
    record_property("soak", soak.Outcome(kind, len(numbers), 0, [])._asdict())
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one-process", "workers"])
def test_rows_are_saved_by_the_process_that_workers_report_to(tmp_path, workers):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", tmp_path / "test_it.py", f"--rootdir={tmp_path}", *workers]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, "--soak", "2000", "--save"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / checks.FILE).read_text())["rows"]
    assert set(rows) == {"soak/combine", "soak/hopper"}
    assert rows["soak/hopper"]["cases"] == FULL and rows["soak/hopper"]["failures"] == 0

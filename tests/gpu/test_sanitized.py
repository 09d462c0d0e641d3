"""The suite that sanitizers watch, without a GPU: its truths, its parts, and what is read of a tool's output."""

import itertools

import pytest
import torch

from moe_kernels import use_backend
from tests.gpu import sanitized, test_sanitizers
from tests.gpu.test_sanitizers import PARTS, TOOLS, command, found_in
from tests.helpers import LAYOUTS


@pytest.mark.parametrize("name", sanitized.RUNS)
def test_the_suite_holds_on_the_reference_backend(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    with use_backend("reference"):
        assert len(list(sanitized.RUNS[name].cases())) > 5


def test_parts_are_the_suite_once():
    assert sorted(name for names in PARTS.values() for name in names) == sorted(sanitized.RUNS)


def test_every_layout_is_watched_along_with_both_storages_and_all_that_gate_up_keeps():
    cases = [(case, how) for case, how in sanitized.EACH_LAYOUT]
    assert [(case.activation, case.interleaved) for case, _ in cases] == LAYOUTS
    assert {(how.transposed, how.stored) for _, how in cases} == {
        (transposed, stored) for transposed in (False, True) for stored in ("both", "h", "a")
    }


def test_routers_of_every_kind_are_watched():
    routes = sanitized.ROUTES
    assert {route.dtype for route in routes} == {torch.bfloat16, torch.float16, torch.float32}
    assert {(route.scoring, route.biased) for route in routes} >= {("sigmoid", True), ("sqrtsoftplus", True)}
    assert {route.scoring for route in routes if route.groups != (1, 1)} == {"sigmoid", "sqrtsoftplus"}
    assert max((route.E, route.K) for route in routes) == (1024, 32)
    assert {route.biased for route in routes if route.E % 4} == {False, True}, "what is padded, a bias as well"


def test_processes_at_once_have_ports_of_their_own():
    ports = [int(line[line.index("--port") + 1]) for line in (command(t, p) for t in TOOLS for p in PARTS)]
    assert all(after - before >= 20 for before, after in itertools.pairwise(ports)) and max(ports) < 65000


CLEAN = "  0.1 s  combine T1\n100 calls\n========= {} SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    "output,status,errors,calls",
    [
        (CLEAN.format("ERROR"), 0, 0, 100),
        ("100 calls\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, 0, 100),
        ("100 calls\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 9, 2, 100),
        (CLEAN.format("ERROR"), 1, 1, 100),
        (CLEAN.format("ERROR"), None, 1, 100),
        ("AssertionError: off\n========= ERROR SUMMARY: 0 errors\n", 0, 1, 0),
        ("100 calls\n", 0, 1, 100),
    ],
    ids=["clean", "no-hazards", "hazards", "status", "out-of-time", "suite-broke-off", "tool-broke-off"],
)
def test_a_part_that_breaks_off_is_an_error(output, status, errors, calls):
    assert found_in(output, status) == {"errors": errors, "calls": calls}


def test_a_report_is_what_the_tool_says_and_the_last_lines():
    lines = [f"{i} s  combine" for i in range(100)]
    report = test_sanitizers.report("\n".join(["========= Invalid read", *lines]))
    assert report.startswith("========= Invalid read\n...\n75 s") and report.endswith("99 s  combine")

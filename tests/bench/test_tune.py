"""The offline tuner without a GPU: what it tries, how it judges, what it writes, and kernels compiled ahead."""

import ast
import inspect
import os
import subprocess
import sys
import types

import pytest
import torch

from moe_kernels.bench import ops, tile_rows, tune
from moe_kernels.bench.compiling import Compiled
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.bench.results import ROOT
from moe_kernels.bench.shapes import SHAPES
from moe_kernels.functional.routing_plan import _block_m

configs = pytest.importorskip("moe_kernels.backends.triton.configs")

TABLES = {name: table for name, table in vars(configs).items() if name in ("_LARGE", "_SMALL")}
ROWS = [(name, key) for name, table in TABLES.items() for key in table if key[1] == 2]
KEY = ("gate_up", 2, 128)
TINY = SHAPES["tiny"]
GPU = "NVIDIA H100 80GB HBM3"


def test_both_tables_are_found():
    assert len(TABLES) == 2 and all(configs.table(capability) in TABLES.values() for capability in ((9, 0), (12, 0)))


# What is tried


@pytest.mark.parametrize("table, key", ROWS, ids=str)
def test_candidates(table, key):
    row = TABLES[table][key]
    found = tile_rows.candidates(key, row)
    assert found[0] == row
    assert len(set(found)) == len(found)
    assert 10 <= len(found) <= 50
    for each in found:
        sizes = each._replace(num_stages=1, block_m=each.block_m or 1)
        assert all(size & (size - 1) == 0 for size in sizes), each
        assert 16 <= each.block_n <= 256 and 16 <= each.block_k <= 128 and 2 <= each.num_stages <= 7, each
        assert each.num_warps in (4, 8) and each.per_sm in (1, 2) and each.group_m >= 1, each
        assert (each.block_m == 0) == (row.block_m == 0), each


def test_every_row_of_two_bytes_has_benchmarks():
    assert {key[0] for _, key in ROWS} == set(tile_rows.TUNED)
    assert {name for names in tile_rows.TUNED.values() for name in names} <= set(ops.OPS)
    for op, names in tile_rows.TUNED.items():
        assert all(op.startswith(ops.OPS[name].op) and ops.OPS[name].width for name in names)


def test_trials_of_some_ops():
    groups = tune.trials(configs.table((9, 0)), ["gate_up", "grouped_wgrad_lhs"])
    assert list(groups) == [*(("gate_up", 2, m) for m in (128, 64, 32, 16)), ("grouped_wgrad_lhs", 2, 0)]
    for key, group in groups.items():
        assert [trial.row for trial in group if trial.current] == [configs.table((9, 0))[key]]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_plan_of_a_case_has_the_rows_block_m(shape):
    for block_m in (128, 64, 32, 16):
        for name, sized in tune.cases(("grouped_gemm", 2, block_m), [shape]):
            assert _block_m(sized.rows, sized.E) == block_m
            assert name in ("grouped_gemm_down", "grouped_gemm_dx")
    assert tune.cases(("grouped_wgrad_rhs", 2, 0), [shape]) == [("grouped_wgrad_gate_up", shape)]


def test_kernels_see_the_row_that_is_tried():
    table, row = configs.table((9, 0)), configs.Tiles(16, 16, 4, 2)
    before = dict(table)
    with pytest.raises(KeyError), tune.in_table(table, tune.Trial(KEY, row, False)):
        assert configs.tiles("gate_up", (9, 0), 2, 128) == row
        raise KeyError
    assert table == before


@pytest.mark.parametrize(
    "result, per_sm, reason",
    [
        (Compiled(227 * 1024, ""), 1, None),
        (Compiled(227 * 1024 + 1, ""), 1, "1 x 227 KiB"),
        (Compiled(113 * 1024, ""), 2, None),
        (Compiled(114 * 1024, ""), 2, "2 x 114 KiB of shared memory, of 227"),
        ("not compiled in 60 s", 1, "not compiled in 60 s"),
    ],
)
def test_what_does_not_fit_is_dropped(result, per_sm, reason):
    found = tune.why_dropped(result, configs.Tiles(64, 64, 4, 3, per_sm=per_sm), 227 * 1024)
    assert found == reason or found.startswith(reason)


# How it is judged


@pytest.fixture
def timings(monkeypatch):
    """``timings[row]`` is the µs that an op takes on it, or the exception that its check ends in."""
    timings, table = {}, dict(configs.table((9, 0)))

    def outcome(raising: bool):
        value = timings[table[KEY]]
        if isinstance(value, Exception) == raising:
            if raising:
                raise value
            timings.setdefault("timed", []).append(table[KEY])
            return value
        return None

    monkeypatch.setattr(ops, "inputs_of", lambda shape, device: types.SimpleNamespace())
    monkeypatch.setitem(ops.OPS, "gate_up", ops.OPS["gate_up"]._replace(run=lambda inputs: [torch.zeros(2)]))
    monkeypatch.setattr(ops, "check", lambda *_: outcome(raising=True))
    monkeypatch.setattr(ops, "gpu_us", lambda op, inputs: outcome(raising=False))
    timings["table"] = table
    return timings


def group_of(timings, *values) -> list[tune.Trial]:
    """Trials whose rows take these; the first is current."""
    rows = [configs.Tiles(128, 64, 8, 4)._replace(group_m=2**i) for i in range(len(values))]
    timings.update(zip(rows, values, strict=True))
    group = [tune.Trial(KEY, row, i == 0) for i, row in enumerate(rows)]
    tune.measure(timings["table"], group, "gate_up", TINY)
    return group


def test_the_best_comes_first_and_the_wrong_is_dropped(timings):
    group = group_of(timings, 500.0, 400.0, Inaccurate("result 0 is off"), 900.0)
    assert [trial.ms for trial in tune.ranked(group)] == [0.4, 0.5, 0.9]
    assert group[2].dropped == "result 0 is off" and tune.better(group) is group[1]
    flops = 4 * TINY.rows * TINY.D * TINY.I
    assert group[1].tflops == pytest.approx(flops / 400e-6 / 1e12)
    counts = [timings["timed"].count(trial.row) for trial in group]
    assert counts == [tune._ROUNDS, tune._ROUNDS, 0, 1], "the current and the near ones again, in turn"


def test_times_of_several_benchmarks_add_up(timings):
    group = group_of(timings, 500.0, 400.0)
    timings[group[1].row] = 650.0
    tune.measure(timings["table"], group, "gate_up", TINY)
    assert [trial.ms for trial in group] == pytest.approx([1.0, 1.05])
    assert tune.better(group) is None


@pytest.mark.parametrize("best, worth", [(489.0, True), (491.0, False), (501.0, False)])
def test_only_two_percent_are_worth_a_change(timings, best, worth):
    group = group_of(timings, 500.0, best)
    assert (tune.better(group) is group[1]) == worth


def test_a_current_row_that_does_not_run_is_replaced(timings):
    group = group_of(timings, Inaccurate("wrong"), 400.0)
    assert tune.better(group) is group[1]
    assert tune.note(group[1], group[0], GPU).endswith(f" on {GPU}, the row before did not run")
    assert tune.better(group_of(timings, Inaccurate("wrong"), Inaccurate("wrong"))) is None


# What is written

NOTE = f"542 TFLOP/s on {GPU}, was 500"


def evaluated(source: str) -> dict:
    names = {"__name__": "rewritten"}
    exec(compile(source, "configs.py", "exec"), names)
    return names


@pytest.mark.parametrize("table, key", ROWS, ids=str)
def test_a_row_is_written_and_nothing_else(table, key):
    source = inspect.getsource(configs)
    row = TABLES[table][key]._replace(block_n=32, per_sm=2, group_m=4)
    written = tile_rows.rewrite(source, table, key, row, NOTE)
    names = evaluated(written)
    changed = {"_LARGE": dict(TABLES["_LARGE"]), "_SMALL": dict(TABLES["_SMALL"])}
    changed[table][key] = row
    assert {name: names[name] for name in changed} == changed
    before, after = source.splitlines(), written.splitlines()
    gone, new = [line for line in before if line not in after], [line for line in after if line not in before]
    assert len(gone) == 1 and f"# tuned: {NOTE}" in "".join(new) and 1 <= len(new) <= 2
    assert all(len(line) <= 120 for line in new)
    assert tile_rows.rewrite(written, table, key, row, NOTE) == written
    again = tile_rows.rewrite(written, table, key, TABLES[table][key], "1 TFLOP/s")
    assert NOTE not in again and len(again.splitlines()) == len(before)


def test_a_row_over_several_lines_becomes_one():
    before, after = "_LARGE = {\n    # why\n", '    ("b", 2, 0): 5,\n}\n'
    row = '    ("a", 2, 0): Tiles(\n        1, 2, 3, 4\n    ),  # old\n'
    written = tile_rows.rewrite(before + row + after, "_LARGE", ("a", 2, 0), configs.Tiles(9, 8, 7, 6), "fast")
    assert written == before + '    ("a", 2, 0): Tiles(9, 8, 7, 6),  # tuned: fast\n' + after


@pytest.mark.parametrize("table, key", [("_LARGE", ("gate_up", 2, 8)), ("_MEDIUM", KEY)], ids=str)
def test_an_unknown_row_is_an_error(table, key):
    with pytest.raises(ValueError, match=f"key must be of a row that {table} has, got"):
        tile_rows.rewrite(inspect.getsource(configs), table, key, configs.Tiles(1, 2, 3, 4), NOTE)


def test_a_row_as_text():
    for table in TABLES.values():
        for row in table.values():
            assert eval(tile_rows.text(row), {"Tiles": configs.Tiles}) == row
    assert tile_rows.text(configs.Tiles(256, 64, 8, 3, per_sm=2)) == "Tiles(256, 64, 8, 3, per_sm=2)"


@pytest.mark.parametrize("capability, table", [((9, 0), "_LARGE"), ((12, 0), "_SMALL")])
def test_better_rows_go_into_the_table_of_the_gpu(tmp_path, capability, table):
    path = tmp_path / "configs.py"
    path.write_text(inspect.getsource(configs))
    groups = tune.trials(configs.table(capability), ["gate_up"])
    for key, group in groups.items():
        for trial in group:
            trial.ms, trial.flops = 1.0, int(5e11)
        group[-1].ms = 0.9 if key == KEY else 0.99
    assert tune.write(path, groups, capability, GPU) == [KEY]
    assert evaluated(path.read_text())[table] == TABLES[table] | {KEY: groups[KEY][-1].row}
    assert f"# tuned: 556 TFLOP/s on {GPU}, was 500" in path.read_text()


# Compiled ahead of the launch

_AHEAD = """
import torch, triton
from moe_kernels.backends.triton import permute
from moe_kernels.bench import compiling

class Here(compiling._Target):
    def get_current_stream(self, device): return 0

def floats(*sizes): return torch.zeros(sizes, dtype=torch.bfloat16)

def call():
    integers = torch.zeros(64, dtype=torch.int32)
    permute.permute(floats(8, 64), None, integers[:9], integers, integers.view(8, 8))

if __name__ == "__main__":
    triton.runtime.driver.set_active(Here(90))
    source, = compiling.recorded(call)
    broken = source._replace(kernel="nonsense")
    print([result for _, result in compiling.compiled([source, source], (9, 0), cap_s=0)])
    results = dict(compiling.compiled([source, broken], (9, 0), workers=2))
    print([results[broken], results[source].shared])
    made = []
    triton.knobs.compilation.listener = lambda **what: made.append((what["metadata"]["hash"], what["cache_hit"]))
    try:
        call()  # compiles, then finds no GPU to launch on
    except AttributeError:
        pass
    print([made == [(results[source].hash, True)]])
"""


def test_a_kernel_compiled_ahead_is_found_by_its_launch(tmp_path):
    (tmp_path / "ahead.py").write_text(_AHEAD)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "ahead.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    late, (reason, shared), found = (ast.literal_eval(line) for line in done.stdout.splitlines())
    assert late == ["not compiled in 0 s"] * 2
    assert reason.startswith("AttributeError") and "nonsense" in reason
    assert shared >= 0 and found == [True]

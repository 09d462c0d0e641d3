"""The floors: what the file may say, what a figure is judged to be, and the command."""

import json

import pytest

from benchmarks import floors
from benchmarks.floors import ELSEWHERE, MET, MISSING, SHORT, STALE, BadFloors, Floor, Unless

ENTRY = {
    "what": "a step",
    "file": "block.json",
    "row": "block/a/ours",
    "metric": "step_ms",
    "relation": "<=",
    "value": 2.0,
}
FLOOR = Floor("an issue", "a step", "a-gpu", None, "block.json", "block/a/ours", "step_ms", "<=", 2.0, None)
HASH = "now"


def document(tmp_path, *entries, lists=None):
    """A floors.toml with one issue. JSON strings, numbers and lists are TOML as well."""

    def table(values: dict) -> str:
        pairs = (f"{key} = {table(v) if isinstance(v, dict) else json.dumps(v)}" for key, v in values.items())
        return "{ " + ", ".join(pairs) + " }"

    body = ",\n".join(map(table, entries))
    path = tmp_path / "floors.toml"
    issue = f'[[issue]]\ntitle = "an issue"\nfloors = [\n{body}\n]\n'
    path.write_text(f'gpu = "a-gpu"\nlists = {table(lists or {})}\n{issue}')
    return path


def results(machine_hash=HASH, other_machine=False, name="A GPU", **rows):
    """A results file with rows of one machine; the last row of another one if asked for."""
    names, gpu = list(rows), {"name": name}
    machine = {name: "m" for name in names} | ({names[-1]: "n"} if other_machine else {})
    return {
        "machines": {"m": {"content_hash": machine_hash, "gpu": gpu}, "n": {"content_hash": HASH, "gpu": gpu}},
        "rows": {name.replace("_", "/"): {**row, "machine": machine[name]} for name, row in rows.items()},
    }


# The file


def test_a_plain_entry(tmp_path):
    assert floors.read(document(tmp_path, ENTRY)) == [FLOOR]


def test_each_makes_a_floor_of_every_combination(tmp_path):
    entry = ENTRY | {"row": "{what}/{shape}/ours", "each": {"shape": ["a", "b"], "what": "kinds"}}
    rows = [floor.row for floor in floors.read(document(tmp_path, entry, lists={"kinds": ["block", "experts"]}))]
    assert rows == ["block/a/ours", "experts/a/ours", "block/b/ours", "experts/b/ours"]


def test_a_floor_relative_to_another_row(tmp_path):
    entry = {key: value for key, value in ENTRY.items() if key != "value"}
    entry |= {"times": {"row": "block/{shape}/peer", "factor": 0.8}, "each": {"shape": ["a"]}}
    (floor,) = floors.read(document(tmp_path, entry))
    assert (floor.value, floor.times_row) == (0.8, "block/a/peer")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"relation": ">"}, "relation must be one of <, <=, >=, got '>'"),
        ({"metric": 3}, "metric must be a string, got 3"),
        ({"row": None}, "row must be a string, got None"),
        ({"value": "fast"}, "value must be a number, got 'fast'"),
        ({"value": True}, "value must be a number, got True"),
        ({"value": None}, "exactly one of value and times"),
        ({"times": {"row": "x", "factor": 1}}, "exactly one of value and times"),
        ({"value": None, "times": {"row": "x"}}, "times must be { row, factor }"),
        ({"value": None, "times": {"row": "x", "factor": "y"}}, "times.factor must be a number"),
        ({"unless": {"row": "x", "metric": "y"}}, "unless must be { row, metric, equals }"),
        ({"unless": {"row": 1, "metric": "y", "equals": "z"}}, "unless.row must be a string, got 1"),
        ({"unless": {"row": "x", "metric": "y", "equals": [1]}}, "unless.equals must be a string or a number, got [1]"),
        ({"unless": {"row": "{shape}", "metric": "y", "equals": "z"}}, "no name for 'shape'"),
        ({"file": "block"}, "file must end in .json"),
        ({"valeu": 1}, "unknown key valeu"),
        ({"row": "block/{shape}/ours"}, "no name for 'shape'"),
        ({"each": {"shape": "nowhere"}}, "each.shape must be a list or one of sizes, got 'nowhere'"),
        ({"each": {"shape": []}}, "each.shape must be a list"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, change, complaint):
    entry = {key: value for key, value in (ENTRY | change).items() if value is not None}
    with pytest.raises(BadFloors) as error:
        floors.read(document(tmp_path, ENTRY, entry, lists={"sizes": [1]}))
    assert complaint in str(error.value)
    assert "floors.toml: floor 2 of 'an issue' (a step)" in str(error.value)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("[[issue]", "floors.toml: "),
        ("[[issues]]\n", "has gpu, [lists] and [[issue]] and nothing else, got issues"),
        ("", "gpu must be a directory of benchmarks/results/, got None"),
        ('gpu = "x"\n[[issue]]\ntitle = "x"\n', "issue 1 must have title and floors, got title"),
    ],
)
def test_a_file_of_another_form(tmp_path, text, complaint):
    path = tmp_path / "floors.toml"
    path.write_text(text)
    with pytest.raises(BadFloors) as error:
        floors.read(path)
    assert complaint in str(error.value)


# The comparison


@pytest.mark.parametrize(
    "relation, found, state, note",
    [
        ("<=", 1.5, MET, ""),
        ("<=", 2.0, MET, ""),
        ("<=", 2.5, SHORT, "by 25.0 %"),
        ("<", 1.5, MET, ""),
        ("<", 2.0, SHORT, "by 0.0 %"),
        (">=", 2.5, MET, ""),
        (">=", 2.0, MET, ""),
        (">=", 1.5, SHORT, "by 25.0 %"),
        ("<=", float("nan"), SHORT, "by nan %"),
    ],
)
def test_relations(relation, found, state, note):
    verdict = floors.judge(FLOOR._replace(relation=relation), results(block_a_ours={"step_ms": found}), HASH)
    assert (verdict.state, verdict.note) == (state, note)


def test_a_limit_of_zero_has_no_percent():
    verdict = floors.judge(FLOOR._replace(value=0), results(block_a_ours={"step_ms": 3}), HASH)
    assert (verdict.state, verdict.note) == (SHORT, "by 3")


@pytest.mark.parametrize(
    "rows, note",
    [
        ({"block_b_ours": {"step_ms": 1.0}}, "no row"),
        ({"block_a_ours": {"forward_ms": 1.0}}, "no step_ms"),
        ({"block_a_ours": {"step_ms": "not finished"}}, "no step_ms"),
    ],
)
def test_missing(rows, note):
    verdict = floors.judge(FLOOR, results(**rows), HASH)
    assert (verdict.state, verdict.note, verdict.found) == (MISSING, note, None)


@pytest.mark.parametrize("found, note", [(1.0, "was met"), (3.0, "was short by 50.0 %")])
def test_stale(found, note):
    verdict = floors.judge(FLOOR, results("then", block_a_ours={"step_ms": found}), HASH)
    assert (verdict.state, verdict.note) == (STALE, note)


@pytest.mark.parametrize("peer, state", [(5.0, MET), (4.0, SHORT)])
def test_beside_another_row(peer, state):
    floor = FLOOR._replace(value=0.5, times_row="block/a/peer")
    rows = results(block_a_ours={"step_ms": 2.5}, block_a_peer={"step_ms": peer})
    verdict = floors.judge(floor, rows, HASH)
    assert (verdict.state, verdict.allowed) == (state, peer / 2)


def test_beside_another_row_that_is_missing():
    floor = FLOOR._replace(value=0.5, times_row="block/a/peer")
    verdict = floors.judge(floor, results(block_a_ours={"step_ms": 2.5}), HASH)
    assert (verdict.state, verdict.note) == (MISSING, "no row of block/a/peer")


def test_rows_of_two_runs_are_not_compared():
    floor = FLOOR._replace(value=0.5, times_row="block/a/peer")
    rows = results(other_machine=True, block_a_ours={"step_ms": 1.0}, block_a_peer={"step_ms": 5.0})
    assert floors.judge(floor, rows, HASH).state == STALE


UNLESS = FLOOR._replace(
    row="op/a/cuda", times_row="op/a/triton", value=0.9, unless=Unless("op/a/triton", "default_backend", "triton")
)


def test_unless_is_read(tmp_path):
    unless = {"row": "op/{shape}/triton", "metric": "default_backend", "equals": "triton"}
    (floor,) = floors.read(document(tmp_path, ENTRY | {"unless": unless, "each": {"shape": ["a"]}}))
    assert floor.unless == Unless("op/a/triton", "default_backend", "triton")


@pytest.mark.parametrize(
    "default, cuda, state, note",
    [
        ("triton", 9.0, MET, "default_backend is triton"),
        ("cuda", 9.0, SHORT, "by 100.0 %"),
        ("cuda", 4.0, MET, ""),
        (None, 9.0, SHORT, "by 100.0 %"),
    ],
)
def test_a_floor_or_what_a_row_says_instead(default, cuda, state, note):
    said = {} if default is None else {"default_backend": default}
    rows = results(op_a_cuda={"step_ms": cuda}, op_a_triton={"step_ms": 5.0, **said})
    verdict = floors.judge(UNLESS, rows, HASH)
    assert (verdict.state, verdict.note, verdict.found, verdict.allowed) == (state, note, cuda, 4.5)


def test_what_a_row_says_needs_no_figure_of_the_other_but_present_code():
    row = {"step_ms": 5.0, "default_backend": "triton"}
    assert floors.judge(UNLESS, results(op_a_triton=row), HASH)[1:3] == (MET, None)
    verdict = floors.judge(UNLESS, results("then", op_a_triton=row), HASH)
    assert (verdict.state, verdict.note) == (STALE, "default_backend was triton")
    assert floors.judge(UNLESS, results(), HASH).state == MISSING


# Several GPUs


@pytest.mark.parametrize(
    "metric, times, is_time",
    [
        ("step_ms", None, True),
        ("gpu_us", None, True),
        ("gpu_us", "op/a/triton", False),
        ("first_step_s", None, False),
        ("step_over_bound", None, False),
        ("times_stock", None, False),
        ("of_copy", None, False),
        ("peak_mib", None, False),
        ("compilations_after", None, False),
    ],
)
def test_what_counts_as_a_time_of_the_gpu(metric, times, is_time):
    assert FLOOR._replace(metric=metric, times_row=times).is_time == is_time


def of(metric, own, other, own_hash=HASH, other_hash=HASH):
    """The verdict where the floors' GPU has measured ``own`` and another one ``other``; None: nothing."""

    def found(value, code, name):
        return results(code, name=name, **({} if value is None else {"block_a_ours": {metric: value}}))

    both = {"b-gpu": found(other, other_hash, "GPU B"), "a-gpu": found(own, own_hash, "GPU A")}
    return floors.judge_of(FLOOR._replace(metric=metric), both, HASH)


@pytest.mark.parametrize("metric", ["step_ms", "over_bound"])
@pytest.mark.parametrize("own, state", [(1.0, MET), (3.0, SHORT)])
def test_present_figures_of_the_floors_gpu_count_first(metric, own, state):
    verdict = of(metric, own, 1.5)
    assert (verdict.state, verdict.found) == (state, own) and "GPU" not in verdict.note


@pytest.mark.parametrize("own", [None, 1.0])
@pytest.mark.parametrize("other, state, note", [(1.5, MET, "on GPU B"), (3.0, SHORT, "by 50.0 % on GPU B")])
def test_a_ratio_of_another_gpu_settles_a_floor(own, other, state, note):
    verdict = of("over_bound", own, other, own_hash="then")
    assert (verdict.state, verdict.found, verdict.note) == (state, other, note)


@pytest.mark.parametrize("own, older", [(None, ""), (1.75, "; GPU A: 1.75 on older code")])
@pytest.mark.parametrize("other, note", [(1.5, "met on GPU B"), (3.0, "short on GPU B by 50.0 %")])
def test_a_time_of_another_gpu_settles_none(own, older, other, note):
    verdict = of("step_ms", own, other, own_hash="then")
    assert (verdict.state, verdict.found, verdict.note) == (ELSEWHERE, other, note + older)


def test_a_time_beside_another_row_of_its_run_is_a_ratio():
    found = results(name="GPU B", op_a_cuda={"step_ms": 4.0}, op_a_triton={"step_ms": 5.0})
    verdict = floors.judge_of(UNLESS, {"a-gpu": results(), "b-gpu": found}, HASH)
    assert (verdict.state, verdict.note) == (MET, "on GPU B")
    found["rows"]["op/a/triton"]["default_backend"] = "triton"
    verdict = floors.judge_of(UNLESS, {"a-gpu": results(), "b-gpu": found}, HASH)
    assert (verdict.state, verdict.note) == (MET, "default_backend is triton on GPU B")


@pytest.mark.parametrize(
    "own, other, found, note",
    [(1.0, 1.5, 1.0, "was met"), (None, 1.5, 1.5, "was met on GPU B"), (None, None, None, "")],
)
def test_old_figures_of_several_gpus(own, other, found, note):
    verdict = of("step_ms", own, other, own_hash="then", other_hash="then")
    state = MISSING if found is None else STALE
    assert (verdict.state, verdict.found, verdict.note) == (state, found, note or "no row")


# The command


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A place with floors and results: step_ms 1.0 and 9.0 against 2.0."""
    (tmp_path / "results" / "a-gpu").mkdir(parents=True)
    found = results(block_a_ours={"step_ms": 1.0}, block_b_ours={"step_ms": 9.0})
    (tmp_path / "results" / "a-gpu" / "block.json").write_text(json.dumps(found))
    path = document(tmp_path, ENTRY)
    slow = path.read_text().replace("an issue", "another issue").replace("block/a", "block/b")
    path.write_text(path.read_text() + slow[slow.index("[[issue]]") :])
    read = floors.read
    monkeypatch.setattr(floors, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(floors, "read", lambda: read(path))
    monkeypatch.setattr(floors, "content_hash", lambda: HASH)


@pytest.mark.parametrize("issue, code", [("AN ISSUE", 0), ("another", 1), ("", 1)])
def test_exit_status(measured, capsys, issue, code):
    assert floors.main(["--gpu", "a-gpu", "--issue", issue]) == code
    out = capsys.readouterr().out
    assert ("short by 350.0 %" in out) == bool(code)
    assert "short, short" not in out
    assert "step_ms" in out


def test_another_gpu_is_named_and_nothing_of_it_is_plainly_met(measured, tmp_path, capsys):
    (tmp_path / "results" / "cpu").mkdir()
    (tmp_path / "results" / "b-gpu").mkdir()
    found = results(name="GPU B", block_a_ours={"step_ms": 1.5})
    (tmp_path / "results" / "b-gpu" / "block.json").write_text(json.dumps(found))
    assert floors.main(["--issue", "an issue"]) == 0
    assert "GPU B" not in capsys.readouterr().out
    assert floors.main(["--issue", "an issue", "--gpu", "b-gpu"]) == 1
    assert "elsewhere, met on GPU B" in (out := capsys.readouterr().out) and "0 met, 0 short, 1 elsewhere" in out
    old = results("then", block_a_ours={"step_ms": 1.0})
    (tmp_path / "results" / "a-gpu" / "block.json").write_text(json.dumps(old))
    assert floors.main(["--issue", "an issue"]) == 1
    assert "A GPU: 1 on" in (out := capsys.readouterr().out) and "1 elsewhere" in out
    with pytest.raises(SystemExit):
        floors.main(["--gpu", "cpu"])


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--gpu", "c-gpu"], "no results of 'c-gpu'; there are those of a-gpu"),
        (
            ["--gpu", "a-gpu", "--issue", "nothing"],
            "no title has 'nothing'; the titles are\n  an issue\n  another issue",
        ),
    ],
)
def test_bad_arguments(measured, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stop:
        floors.main(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


LONG = "short on NVIDIA H200 by 123.4 %; NVIDIA H100 80GB HBM3: 123.4 on older code"


@pytest.mark.parametrize("state, note", [(MISSING, "no row"), (ELSEWHERE, LONG)])
def test_a_log_has_every_name_in_full(capsys, state, note):
    verdicts = [floors.Verdict(floor, state, None, None, note) for floor in floors.read()]
    floors.show(verdicts)
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert [verdict.floor.row for verdict in verdicts if f" {verdict.floor.row} " not in out] == []


def test_a_name_that_no_log_is_wide_enough_for_is_folded(capsys):
    row = "a-long-name/" * 20
    floors.show([floors.Verdict(FLOOR._replace(row=row), MISSING, None, None, "no row")])
    cells = [line.split("\u2502")[2].strip() for line in capsys.readouterr().out.splitlines() if "\u2502" in line]
    assert "".join(cells) == f"{row}step_ms"


def test_without_rich_a_floor_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(floors.importlib.util, "find_spec", lambda name: None)
    floors.show([floors.Verdict(FLOOR, MISSING, None, None, "no row")])
    issue, line, summary = capsys.readouterr().out.splitlines()
    assert issue == FLOOR.issue and "1 missing" in summary
    assert line.strip().split(" | ")[:3] == [FLOOR.what, FLOOR.row, FLOOR.metric] and line.endswith("missing, no row")

"""Result files: rows replace rows of their name, and machines nobody refers to are forgotten."""

import json

import pytest

from moe_kernels.bench import results
from moe_kernels.bench.machine import content_hash, machine
from moe_kernels.bench.session import Session, rounded

OLD, NEW = {"content_hash": "old"}, {"content_hash": "new"}


def hashes(path) -> dict[str, str]:
    found = results.load(path)
    return {name: found["machines"][row["machine"]]["content_hash"] for name, row in found["rows"].items()}


def test_a_partial_run_keeps_the_other_rows(tmp_path):
    path = tmp_path / "some" / "block.json"
    results.save(path, {"a": {"step_ms": 1.0}, "b": {"step_ms": 2.0}}, OLD)
    results.save(path, {"b": {"step_ms": 3.0}, "c": {"step_ms": 4.0}}, NEW)
    assert {name: row["step_ms"] for name, row in results.load(path)["rows"].items()} == {"a": 1, "b": 3, "c": 4}
    assert hashes(path) == {"a": "old", "b": "new", "c": "new"}


def test_a_machine_without_rows_is_forgotten(tmp_path):
    path = tmp_path / "block.json"
    results.save(path, {"a": {}}, OLD)
    results.save(path, {"a": {}}, NEW)
    assert [line["content_hash"] for line in results.load(path)["machines"].values()] == ["new"]


def test_files_are_sorted_so_that_differences_can_be_read(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    results.save(first, {"a": {"x": 1, "y": 2}, "b": {}}, OLD)
    results.save(second, {"b": {}, "a": {"y": 2, "x": 1}}, OLD)
    assert first.read_text() == second.read_text()


def test_a_session_saves_each_file(tmp_path, session):
    session.record("block.json", "block/x/uniform/eager", {"step_ms": 1.23456789, "first_call_s": 3})
    session.record("ops.json", "op/combine/x/triton", {"gpu_us": 2.0})
    assert session.save(tmp_path) == [tmp_path / "block.json", tmp_path / "ops.json"]
    (row,) = json.loads((tmp_path / "block.json").read_text())["rows"].values()
    assert row["step_ms"] == 1.2346 and row["first_call_s"] == 3
    assert session.find("ops.json", "op/combine/x/triton") == {"gpu_us": 2.0}
    assert session.find("ops.json", "op/permute/x/triton") is None


def test_a_forced_backend_is_refused(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"MOE_KERNELS_BACKEND must be unset: .* got 'triton'"):
        Session("cpu")


@pytest.mark.parametrize("value, kept", [(1234.5678, 1234.6), (0.00123456, 0.0012346), (7, 7), ("word", "word")])
def test_rounding_keeps_five_digits(value, kept):
    assert rounded(value) == kept


def test_the_machine_line_says_what_code_was_measured():
    assert machine()["content_hash"] == content_hash() and len(content_hash()) == 16


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of one line a file."""
    counted = ("moe_kernels/ops/a.py", "moe_kernels/bench/measure.py", "csrc/sm90/a.cuh", "CMakeLists.txt", "setup.py")
    other = ("moe_kernels/cli/bench.py", "moe_kernels/backends/reference/a.py", "csrc/README.md", "tests/a.py", "x.py")
    for name in (*counted, *other):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("line\n")
    monkeypatch.setattr("moe_kernels.bench.machine._PACKAGE", tmp_path / "moe_kernels")
    return tmp_path, counted, other


def test_the_content_hash_counts_what_changes_a_figure(checkout):
    root, counted, other = checkout
    hashes = [content_hash()]
    for name in other:
        (root / name).write_text("another line\n")
    assert content_hash() == hashes[0]
    for name in counted:
        (root / name).write_text("another line\n")
        hashes.append(content_hash())
    (root / "csrc/sm90/b.cuh").write_text("")
    hashes.append(content_hash())
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "name, text",
    [
        ("moe_kernels/ops/a.py", "# why\n\n    #: which\nline  \n"),
        ("csrc/sm90/a.cuh", "// why\nline\n\n"),
        ("CMakeLists.txt", "# why\n#\n\nline\n"),
    ],
)
def test_the_content_hash_ignores_comments_and_blanks(checkout, name, text):
    before = content_hash()
    (checkout[0] / name).write_text(text)
    assert content_hash() == before

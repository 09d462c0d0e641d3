"""``moe-kernels models``: its table, its document and what it refuses. What it finds: tests/integrations."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from moe_kernels.cli import main, models

ONE = {
    ("mixtral", "experts", "MixtralExperts"): "accelerated",
    ("mixtral", "block", "MixtralSparseMoeBlock"): "nothing to fuse",
    ("dbrx", "router", "DbrxRouter"): "not switchable",
}


def table(version: str, verdicts=ONE) -> models.Table:
    return {key: {version: verdict} for key, verdict in verdicts.items()}


def document(path: Path | None) -> argparse.Namespace:
    return argparse.Namespace(markdown=path)


@pytest.fixture
def found(monkeypatch):
    """What the survey finds, to be replaced."""
    result = {"version": "5.17.0", "verdicts": ONE}
    monkeypatch.setattr(models, "collect", lambda: (result["version"], table(**result)))
    return result


def test_a_column_for_each_version(tmp_path, found):
    path = tmp_path / "models.md"
    assert models.run(document(path)) == 0
    newer = {**ONE, ("dbrx", "router", "DbrxRouter"): "accelerated", ("beam", "block", "BeamMoE"): "its reason"}
    del newer["mixtral", "block", "MixtralSparseMoeBlock"]
    found |= {"version": "5.23.0", "verdicts": newer}
    models.run(document(path))
    lines = path.read_text().splitlines()
    assert lines[0] == "# Supported models"
    assert [line for line in lines if line.startswith("|")] == [
        "|  | 5.17.0 | 5.23.0 |",
        "| --- | --- | --- |",
        "| experts | 1: 1 accelerated | 1: 1 accelerated |",
        "| router | 1: 1 stock | 1: 1 accelerated |",
        "| block | 1: 1 nothing to fuse | 1: 1 stock |",
        "| family | part | class | 5.17.0 | 5.23.0 |",
        "| --- | --- | --- | --- | --- |",
        "| beam | block | `BeamMoE` | - | its reason |",
        "| dbrx | router | `DbrxRouter` | not switchable | accelerated |",
        "| mixtral | experts | `MixtralExperts` | accelerated | accelerated |",
        "| mixtral | block | `MixtralSparseMoeBlock` | nothing to fuse | - |",
    ]
    before = path.read_text()
    models.run(document(path))
    assert path.read_text() == before


def test_a_changed_verdict_and_a_class_that_went_away_change_the_document(tmp_path, found):
    text = models.renewed("", "5.17.0", table("5.17.0"))
    changed = {**ONE, ("dbrx", "router", "DbrxRouter"): "accelerated"}
    assert models.renewed(text, "5.17.0", table("5.17.0", changed)) != text
    fewer = {key: verdict for key, verdict in ONE.items() if key[0] != "dbrx"}
    assert "dbrx" not in models.renewed(text, "5.17.0", table("5.17.0", fewer))


def test_versions_are_in_the_order_of_numbers():
    text = models.renewed(models.renewed("", "5.9.0", table("5.9.0")), "5.17.0.dev0", table("5.17.0.dev0"))
    assert "| family | part | class | 5.9.0 | 5.17.0.dev0 |" in text


def test_the_table(found, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    assert models.run(document(None)) == 0
    out = capsys.readouterr().out
    for word in ("Transformers 5.17.0", "MixtralSparseMoeBlock", "not switchable", "router: 1: 1 stock"):
        assert word in out


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path, found, monkeypatch, capsys):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    assert main.main(["models", "--markdown", str(path)]) == 2
    assert path.read_text() == "# Mine\n"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--markdown" in error and "README.md exists and is no list" in error


@pytest.mark.parametrize("name", ["", "missing/models.md"])
def test_a_place_that_cant_be_written_is_one_line(name, tmp_path, found, capsys):
    assert main.main(["models", "--markdown", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"can't renew {tmp_path / name}" in error


def test_a_bad_argument_is_one_line():
    command = [sys.executable, "-m", "moe_kernels", "models", "--markdown", ""]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "must name something" in done.stderr

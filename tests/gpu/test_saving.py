"""Rows of checks.json reach the file while tests run, whole, and beside those of other processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_kernels.bench import results
from tests.gpu import checks
from tests.gpu.soak import FULL

OLD, NEW = {"content_hash": "old"}, {"content_hash": "new"}


def soaked(cases, failures=0):
    return {"soak/combine": {"cases": cases, "declined": 0, "failures": failures}}


@pytest.mark.parametrize(
    "before,on,row,put",
    [
        (FULL, NEW, soaked(25), False),
        (FULL, NEW, soaked(25, failures=1), True),
        (FULL, NEW, soaked(FULL), True),
        (FULL, OLD, soaked(25), True),
        (25, NEW, soaked(50), True),
    ],
    ids=["shorter", "shorter-with-a-failure", "as-long", "of-other-code", "longer"],
)
def test_a_shorter_soak_leaves_a_longer_one_of_the_same_code(tmp_path, before, on, row, put):
    path = tmp_path / "gpu" / checks.FILE
    checks.save(path, soaked(before), on)
    assert checks.save(path, row, NEW) == ["soak/combine"] * put
    expected = row["soak/combine"] if put else soaked(before)["soak/combine"]
    assert results.load(path)["rows"]["soak/combine"].items() >= expected.items()
    assert [each.name for each in path.parent.iterdir()] == [checks.FILE], "nothing is left beside it"


def put_rows(path, name):
    for i in range(20):
        checks.save(path, {f"{name}/{i}": {"errors": 0}}, NEW)


def test_processes_that_save_at_once_keep_each_others_rows(tmp_path):
    path, fresh = tmp_path / checks.FILE, multiprocessing.get_context("fork")
    processes = [fresh.Process(target=put_rows, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert set(results.load(path)["rows"]) == {f"{name}/{i}" for name in "abc" for i in range(20)}


CONFTEST = """
import pathlib
from moe_kernels.bench import results
from tests.gpu import checks
from tests.gpu.conftest import *

checks.PAUSE = 0
results.results_dir = lambda: pathlib.Path(__file__).parent
"""
TESTS = """
import time
import pytest
from tests.gpu import soak

@pytest.mark.parametrize("kind,numbers", [c for kind in ("combine", "hopper") for c in soak.chunks(kind, 2000)])
def test_it(kind, numbers, record_property):
    record_property("soak", soak.Outcome(kind, len(numbers), 0, [])._asdict())
    time.sleep(SECONDS if kind == "hopper" else 0)
"""


def start(folder, seconds, workers=()):
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS.replace("SECONDS", str(seconds)))
    command = [sys.executable, "-m", "pytest", folder / "test_it.py", f"--rootdir={folder}", *workers]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*command, "--soak", "2000", "--save"], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


WORKERS = pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one-process", "workers"])


@pytest.mark.slow
@WORKERS
def test_rows_are_saved_by_the_process_that_workers_report_to(tmp_path, workers):
    session = start(tmp_path, 0, workers)
    output, _ = session.communicate(timeout=100)
    assert session.returncode == 0, output
    assert "soak/hopper: 2000 cases" in output and "saved soak/combine, soak/hopper in checks.json" in output
    rows = json.loads((tmp_path / checks.FILE).read_text())["rows"]
    assert {name: row["cases"] for name, row in rows.items()} == {"soak/combine": FULL, "soak/hopper": FULL}
    assert all(row["failures"] == 0 for row in rows.values())


@pytest.mark.slow
@WORKERS
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_what_is_done_outlives_the_session(tmp_path, workers, how):
    session, path = start(tmp_path, 1, workers), tmp_path / checks.FILE
    try:
        until = time.monotonic() + 60
        while results.load(path)["rows"].get("soak/hopper", {}).get("cases", 0) < 50:
            assert time.monotonic() < until and session.poll() is None
            time.sleep(0.1)
        os.kill(session.pid, how)
        time.sleep(1)
        rows = results.load(path)["rows"]
        assert rows["soak/combine"]["cases"] == FULL and 50 <= rows["soak/hopper"]["cases"] < FULL
    finally:
        os.killpg(session.pid, signal.SIGKILL)
        session.communicate()

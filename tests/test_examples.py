"""The examples run as they are and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    if path.stem == "trainer":
        pytest.importorskip("accelerate")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a second thread mostly waits on a busy machine
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"'?\bloss\b'?:? +'?([0-9.]+)", done.stdout)]
    assert len(losses) >= 3 and losses[-1] < 0.8 * losses[0], done.stdout
    assert not list(tmp_path.iterdir()), "it left files behind"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 70


def test_the_three_examples_are_there():
    assert {path.stem for path in EXAMPLES} >= {"trainer", "pytorch_loop", "without_huggingface"}

"""The CUDA kernels under compute-sanitizer: memcheck, racecheck, synccheck and initcheck have nothing to say.

pytest tests/gpu/test_sanitizers.py -m sanitizer -n 4 --save
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.sanitizer]

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 300  # seconds, of each tool
#: mbarriers of a block that a tool tracks: a Hopper kernel has 16 to 19, and a kernel's own count isn't found.
BARRIERS = ["--num-cuda-barriers", "64"]
TOOLS = {
    "memcheck": ["--report-api-errors", "no"],  # torch asks the driver for symbols that it need not have
    "racecheck": BARRIERS,
    "synccheck": BARRIERS,
    "initcheck": [],
}
#: Part of the mangled name of every kernel of ours, and of no kernel of torch's.
OURS = "11moe_kernels"
FOUND = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.MULTILINE)


def command(tool: str, port: int) -> list[str]:
    return [
        *["compute-sanitizer", "--tool", tool, "--kernel-name", f"kns={OURS}", *TOOLS[tool]],
        *["--error-exitcode", "9", "--print-limit", "30", "--launch-timeout", "60", "--port", str(port)],
        *["--target-processes", "application-only", sys.executable, "-m", "tests.gpu.sanitized"],
    ]


def report(output: str) -> str:
    """What the tool says, without the cases that passed, and the last of them."""
    lines = output.splitlines()
    said = [line for line in lines if line.startswith("===") and "Host Frame" not in line and line.strip("= ")]
    return "\n".join([*said[:80], "...", *lines[-25:]])


@pytest.mark.parametrize("tool", TOOLS)
def test_clean(tool, record_property):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    # An allocation each, so that an access past its end is seen; otherwise tensors lie side by side in a large one
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("MOE_KERNELS_BACKEND", None)
    start, port = time.perf_counter(), 49200 + 20 * list(TOOLS).index(tool)
    process = subprocess.Popen(
        command(tool, port), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the tool and what it runs
        output, _ = process.communicate()
        pytest.fail(f"{tool} took more than {TIME_LIMIT} s\n{report(output)}")
    if "Device not supported" in output:
        pytest.skip(f"compute-sanitizer can't watch this device\n{report(output)}")
    found, calls = FOUND.findall(output), re.findall(r"^(\d+) calls$", output, re.MULTILINE)
    assert found and calls, f"{tool} or what it runs broke off (status {process.returncode})\n{report(output)}"
    row = {"errors": sum(map(int, found)), "calls": int(calls[-1]), "seconds": round(time.perf_counter() - start, 1)}
    record_property("sanitizer", {"tool": tool, **row})
    assert process.returncode == 0 and row["errors"] == 0, report(output)

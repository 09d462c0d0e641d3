"""The CUDA kernels under compute-sanitizer: memcheck, racecheck, synccheck and initcheck have nothing to say.

Each tool watches the suite in parts, a process each, which run side by side.

pytest tests/gpu/test_sanitizers.py -m sanitizer -n 12 --save
"""

import itertools
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
TIME_LIMIT = 300  # seconds, of each part
#: mbarriers of a block that a tool tracks: a Hopper kernel has 14 to 19, and a kernel's own count isn't found.
BARRIERS = ["--num-cuda-barriers", "64"]
TOOLS = {
    "memcheck": ["--report-api-errors", "no"],  # torch asks the driver for symbols that it need not have
    "racecheck": BARRIERS,
    "synccheck": BARRIERS,
    "initcheck": [],
}
#: What tests/gpu/sanitized.py is given.
PARTS = {
    "hopper": ["hopper"],
    "activations": ["activations"],
    "ops": ["routing_plan", "permute", "unpermute", "combine", "decode_experts", "topk_route"],
}
#: Part of the mangled name of every kernel of ours, and of no kernel of torch's.
OURS = "11moe_kernels"
FOUND = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.MULTILINE)


def command(tool: str, part: str) -> list[str]:
    port = 49200 + 20 * (list(TOOLS).index(tool) * len(PARTS) + list(PARTS).index(part))
    return [
        *["compute-sanitizer", "--tool", tool, "--kernel-name", f"kns={OURS}", *TOOLS[tool]],
        # Those of the host are dozens of Python's own frames
        *["--show-backtrace", "device"],
        *["--error-exitcode", "9", "--print-limit", "30", "--launch-timeout", "60", "--port", str(port)],
        *["--target-processes", "application-only", sys.executable, "-m", "tests.gpu.sanitized", *PARTS[part]],
    ]


def version() -> str:
    """The tool's own: what it sees and what it reports by mistake changes with it."""
    said = subprocess.run(["compute-sanitizer", "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return re.search(r"Version (\S+)", said)[1]


def report(output: str) -> str:
    """What the tool says, without the cases that passed, and the last of them."""
    lines = output.splitlines()
    said = [line for line in lines if line.startswith("===") and line.strip("= ")]
    return "\n".join([*said[:80], "...", *lines[-25:]])


def found_in(output: str, status: int | None) -> dict[str, int]:
    """Errors and calls; to break off, run out of time (no status) or fail is at least one error."""
    found, calls = FOUND.findall(output), re.findall(r"^(\d+) calls$", output, re.MULTILINE)
    failed = not (found and calls) or status != 0
    return {"errors": max(sum(map(int, found)), int(failed)), "calls": int(calls[-1]) if calls else 0}


@pytest.mark.parametrize("tool,part", list(itertools.product(TOOLS, PARTS)))
def test_clean(tool, part, record_property):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    # An allocation each, so that an access past its end is seen; otherwise tensors lie side by side in a large one.
    # The truth is made on the host, where processes run side by side: a thread each.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("MOE_KERNELS_BACKEND", None)
    start = time.perf_counter()
    process = subprocess.Popen(
        command(tool, part), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the tool and what it runs
        output, status = process.communicate()[0], None
    if "Device not supported" in output:
        pytest.skip(f"compute-sanitizer can't watch this device\n{report(output)}")
    row = found_in(output, status) | {"seconds": round(time.perf_counter() - start, 1)}
    of = {"tool": tool, "part": part, "parts": len(PARTS), "version": version()}
    record_property("sanitizer", of | row)
    ended = f"status {status}" if status is not None else f"stopped after {TIME_LIMIT} s"
    assert row["errors"] == 0, f"{tool} of {part}: {row['errors']} errors, {ended}\n{report(output)}"

"""Every Triton kernel compiles for every architecture, and every tile configuration fits its shared memory.

No GPU needed. ``MOE_KERNELS_AOT=sm_90`` restricts to one architecture; ``MOE_KERNELS_AOT=all`` compiles every row of
the tile table for all of them, where the default does that for sm_90 alone and takes the tallest row elsewhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_kernels import backends

pytest.importorskip("triton")

#: Bytes of shared memory one block may have, from the CUDA C++ Programming Guide, "Technical Specifications per Compute
#: Capability". Not the library's own table: that one is under test.
LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024}

OPS = sorted(backends.IMPLEMENTS["triton"])
#: Kernels that hold a whole row in registers.
IN_REGISTERS = ("route_kernel", "route_bwd_kernel")
WANTED = os.environ.get("MOE_KERNELS_AOT", "")
SCRIPT = Path(__file__).with_name("aot_compile.py")
ROOT = Path(__file__).parents[2]


def wanted(arch):
    return WANTED in ("", "all", f"sm_{arch}")


def compile_all(arch, ops, every_row):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), str(arch), *ops, *(["--every-row"] if every_row else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last = results[-1]["variant"] if results else "nothing"
    assert done.returncode == 0, f"after {last}:\n{done.stderr[-3000:]}"
    return results


def check(results, arch, ops):
    assert {r["variant"].partition("-")[0] for r in results} == set(ops)
    too_much = [f"{r['variant']}: {r['shared']} bytes" for r in results if r["shared"] > LIMIT[arch]]
    assert not too_much, f"more shared memory than the {LIMIT[arch]} bytes of sm_{arch}: {too_much}"
    assert all(r["cubin"] > 0 for r in results)
    spilled = [f"{r['variant']}: {r['stack']} bytes" for r in results if r["kernel"] in IN_REGISTERS and r["stack"]]
    assert not spilled, f"spilled on sm_{arch}: {spilled}"


def assert_every_row(results, arch, ops):
    """Rows are recorded where a launch looks them up: one that no launch asks for would fail here."""
    configs = pytest.importorskip("moe_kernels.backends.triton.configs")
    compiled = {tuple(row) for r in results for row in r["rows"]}
    # An op may have several rows for one block_m: grouped_wgrad_lhs, grouped_wgrad_rhs.
    assert compiled == {row for row in configs.table(divmod(arch, 10)) if row[0].startswith(tuple(ops))}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.skipif(not wanted(90), reason=f"MOE_KERNELS_AOT={WANTED}")
def test_every_row_of_the_table_on_sm_90(op):
    results = compile_all(90, [op], every_row=True)
    check(results, 90, [op])
    assert_every_row(results, 90, [op])


@pytest.mark.parametrize("arch", [arch for arch in LIMIT if arch != 90], ids=lambda arch: f"sm_{arch}")
def test_every_kernel_on_other_architectures(arch):
    if not wanted(arch):
        pytest.skip(f"MOE_KERNELS_AOT={WANTED}")
    results = compile_all(arch, OPS, every_row=WANTED == "all")
    check(results, arch, OPS)
    if WANTED == "all":
        assert_every_row(results, arch, OPS)


def test_the_librarys_limits_are_the_documented_ones():
    configs = pytest.importorskip("moe_kernels.backends.triton.configs")
    for arch, limit in LIMIT.items():
        assert configs.shared_memory_limit(divmod(arch, 10)) == limit, f"sm_{arch}"
    assert configs.shared_memory_limit((13, 7)) == min(LIMIT.values()), "an unknown GPU gets the smallest"

"""The CUDA sources, on any machine with nvcc: they compile for every architecture, without spills, with wide accesses.

And the door to the extension, on any machine: what it says where it can't be used.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moe_kernels import backends
from moe_kernels.backends.cuda import _extension

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CMAKE = (ROOT / "CMakeLists.txt").read_text()
ARCHS = re.search(r'DEFAULT_ARCHS "([\d;a]+)"', CMAKE)[1].split(";")
KERNEL_FILES = sorted(path.name for path in CSRC.glob("*.cu"))
HOPPER_FILES = set(re.findall(r"csrc/(\w+\.cu)", re.search(r"set\(SM90_SOURCES(.*?)\)", CMAKE, re.DOTALL)[1]))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def nvcc(*arguments) -> str:
    command = ["nvcc", "-std=c++17", "-O3", "-I", str(CSRC), "-Werror", "all-warnings", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


# The sources


def test_cmake_lists_every_source():
    listed = set(re.findall(r"csrc/(\w+\.(?:cu|cpp))", CMAKE))
    assert listed == {path.name for suffix in ("cu", "cpp") for path in CSRC.glob(f"*.{suffix}")}


def test_every_op_of_the_backend_has_its_files():
    for op in backends.IMPLEMENTS["cuda"]:
        assert (CSRC / f"{op}.cu").exists() and (CSRC / f"{op}.h").exists()
        assert f'm.def("{op}"' in re.sub(r"\s", "", (CSRC / "bindings.cpp").read_text())


def test_no_torch():
    for path in filter(Path.is_file, CSRC.rglob("*")):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path.name


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_FILES)
def test_compiles_for_every_architecture_without_spills(name, tmp_path):
    archs = ["90a"] if name in HOPPER_FILES else ARCHS
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    report = nvcc("-c", *targets, "-Xptxas=-v", CSRC / name, "-o", tmp_path / "kernels.o")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(archs)
    assert set(spills) == {("0", "0", "0")}, report


@needs_nvcc
def test_combine_moves_sixteen_bytes_at_a_time(tmp_path):
    nvcc("-ptx", "-arch=compute_90", CSRC / "combine.cu", "-o", tmp_path / "combine.ptx")
    entries = (tmp_path / "combine.ptx").read_text().split(".entry")[1:]
    assert len(entries) == 18  # three dtypes, K in 1, 2, 4, 6, 8 and any
    for entry in entries:
        top_k = int(re.search(r"combine_kernelI\w+?Li(\d)E", entry)[1])
        assert len(re.findall(r"ld\.global\.cs\.v4\.[ubf]32", entry)) == (top_k or 8)
        assert len(re.findall(r"st\.global\.v4\.[ubf]32", entry)) == 1


# The door


@pytest.fixture
def extension(monkeypatch):
    """A stand-in for ``_C``, so that these answers can be tested where it isn't built."""

    class Extension:
        NONE, FLOAT32, BFLOAT16, FLOAT16 = range(4)
        architectures = "80,90,100,120"
        cuda_version = "13.0"
        driver_version = staticmethod(lambda: 13000)
        sm90 = True

    def forget():
        for function in (_extension.unavailable, _extension.dtype_codes):
            function.cache_clear()

    monkeypatch.setattr(_extension, "_load", lambda: Extension)
    forget()
    yield Extension
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    "driver, reason",
    [
        (0, "no NVIDIA driver was found"),
        (12080, "serves CUDA 12.8, but the extension was built with CUDA 13.0 and needs driver 580 or newer"),
        (13000, None),
        (14010, None),
    ],
)
def test_driver_too_old(extension, driver, reason):
    extension.driver_version = staticmethod(lambda: driver)
    found = _extension.unavailable()
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("No module named 'moe_kernels._C'"), "is not built"),
        (ImportError("libfoo.so.1: cannot open"), "can't be imported (libfoo.so.1: cannot open)"),
    ],
)
def test_extension_missing(extension, monkeypatch, error, reason):
    monkeypatch.setattr(_extension, "_load", lambda: error)
    assert reason in _extension.unavailable()
    problem = backends.Problem(torch.device("cuda"), torch.bfloat16, (64,))
    assert reason in backends.why_not("cuda", "combine", problem)


@pytest.mark.parametrize(
    "capability, runs",
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),  # the machine code of 8.0
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), False),
        ((12, 1), True),
        ((13, 0), True),  # the PTX of the last one
    ],
)
def test_architectures(extension, capability, runs):
    assert _extension.runs_on(capability) is runs


def test_supports_names_the_reason(extension, monkeypatch):
    cpu = backends.Problem(torch.device("cpu"), torch.bfloat16, (64,))
    assert "device type cpu" in backends.why_not("cuda", "combine", cpu)

    monkeypatch.setattr("moe_kernels.backends.cuda._device", lambda device: None)
    gpu = backends.Problem(torch.device("cuda"), torch.bfloat16, (64,))
    assert backends.why_not("cuda", "combine", gpu) is None
    assert "float64" in backends.why_not("cuda", "combine", gpu._replace(dtype=torch.float64))
    assert "width 12 is not a multiple of 8" in backends.why_not("cuda", "combine", gpu._replace(dims=(64, 12)))


HOPPER = backends.Problem(torch.device("cuda"), torch.bfloat16, (128, 72), block_m=128)


@pytest.mark.parametrize("op", ["gate_up", "grouped_gemm", "d_activation", "grouped_wgrad"])
@pytest.mark.parametrize(
    "capability, change, reason",
    [
        ((9, 0), {}, None),
        ((10, 0), {}, "is for Hopper"),
        ((9, 0), {"dtype": torch.float16}, "takes bfloat16, not float16"),
        ((9, 0), {"block_m": 64}, "the plan has 64"),
        ((9, 0), {"traits": ("bias", "activation geglu")}, "has no bias, activation geglu"),
        ((9, 0), {"dims": (72, 128)}, "multiple of 64, not 72"),
    ],
)
def test_what_the_hopper_kernels_take(extension, monkeypatch, op, capability, change, reason):
    monkeypatch.setattr("moe_kernels.backends.cuda._device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = backends.why_not("cuda", op, HOPPER._replace(**change))
    if "dims" in change and op not in ("gate_up", "d_activation"):
        reason = None  # nothing is gathered, or a mask is at hand
    assert found is None if reason is None else reason in found


def test_built_without_the_hopper_kernels(extension, monkeypatch):
    monkeypatch.setattr("moe_kernels.backends.cuda._device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    extension.sm90 = False
    assert "without its Hopper kernels" in backends.why_not("cuda", "gate_up", HOPPER)

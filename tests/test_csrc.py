"""The CUDA sources, on any machine with nvcc: they compile for every architecture, without spills, with wide accesses.

And the door to the extension, on any machine: what it says where it can't be used.
"""

import ctypes
import re
import shutil
import subprocess
import weakref
from pathlib import Path

import pytest
import torch

from moe_kernels import backends
from moe_kernels.backends.cuda import _extension
from moe_kernels.backends.cuda import d_activation as cuda_d_activation
from moe_kernels.backends.cuda import grouped_gemm as cuda_grouped_gemm
from moe_kernels.ops._contract import ACTIVATIONS
from tests.nvcc import CSRC, needs_nvcc, nvcc

ROOT = Path(__file__).parents[1]
CMAKE = (ROOT / "CMakeLists.txt").read_text()
ARCHS = re.search(r'DEFAULT_ARCHS "([\d;a]+)"', CMAKE)[1].split(";")
KERNEL_FILES = sorted(path.name for path in CSRC.glob("*.cu"))
HOPPER_FILES = set(re.findall(r"csrc/(\w+\.cu)", re.search(r"set\(SM90_SOURCES(.*?)\)", CMAKE, re.DOTALL)[1]))
PTX_TESTS = ROOT / "tests" / "gpu" / "ptx"


# The sources


def test_cmake_lists_every_source():
    listed = set(re.findall(r"csrc/(\w+\.(?:cu|cpp))", CMAKE))
    assert listed == {path.name for suffix in ("cu", "cpp") for path in CSRC.glob(f"*.{suffix}")}


def test_every_op_of_the_backend_has_its_files():
    for op in backends.IMPLEMENTS["cuda"] - {"unpermute"}:  # which launches combine
        assert (CSRC / f"{op}.cu").exists() and (CSRC / f"{op}.h").exists()
        assert f'm.def("{op}"' in re.sub(r"\s", "", (CSRC / "bindings.cpp").read_text())


def test_no_torch():
    for path in filter(Path.is_file, CSRC.rglob("*")):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path.name


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_FILES)
def test_compiles_for_every_architecture_without_spills(name, tmp_path):
    hopper = name in HOPPER_FILES
    archs = ["90a"] if hopper else ARCHS
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    kernels = tmp_path / "kernels"
    report = nvcc("-cubin" if hopper else "-c", *targets, "-Xptxas=-v", CSRC / name, "-o", kernels)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(archs)
    assert set(spills) == {("0", "0", "0")}, report
    if hopper:
        code = machine_code(kernels)
        assert_no_loop_over_lanes(code)
        assert ("HGMMA" in code) == (name != "row_sums.cu")
        assert_operands_are_the_warps(code)


def machine_code(cubin: Path) -> str:
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:  # nvcc may come without it, triton does not
        cuobjdump = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([cuobjdump, "-sass", cubin], check=True, stdout=subprocess.PIPE, text=True).stdout


def assert_no_loop_over_lanes(code: str) -> None:
    """The compiler's way with an operand that may differ between lanes where the instruction takes one for all."""
    assert "EXIT" in code and "BRA.U.ANY" not in code, "see elect in csrc/ptx/copy.cuh"


def assert_operands_are_the_warps(code: str) -> None:
    """Descriptors are worked out in uniform registers: none is moved there between two products."""
    products = [kernel.split("HGMMA")[1:-1] for kernel in code.split("Function :")]
    assert not any("R2UR" in between for kernel in products for between in kernel), (
        "see uniform in csrc/sm90/pipeline.cuh"
    )


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in PTX_TESTS.glob("*.cu")))
def test_kernels_of_the_ptx_tests_compile(name, tmp_path):
    nvcc("-c", "-gencode=arch=compute_90a,code=sm_90a", PTX_TESTS / name, "-o", tmp_path / "kernels.o")


def test_every_ptx_wrapper_has_its_test():
    """By name, on any machine: a kernel in tests/gpu/ptx uses it. tests/gpu/test_ptx.py runs them on Hopper."""
    tested = "".join(re.sub(r"//.*", "", path.read_text()) for path in PTX_TESTS.iterdir())
    for path in (CSRC / "ptx").glob("*.cuh"):
        code = re.sub(r"//.*", "", path.read_text())
        functions = re.findall(r"__device__ __forceinline__ \w+ (\w+)\(", code)
        assert functions and len(functions) == code.count("__device__"), path.name
        names = [name for name in functions if name != "run"]  # that of Wgmma, by its widths below
        assert not [name for name in names if not re.search(rf"ptx::{name}\b", tested)], path.name
    widths = set(re.findall(r"^WGMMA\((\d+),", (CSRC / "ptx" / "wgmma.cuh").read_text(), re.MULTILINE))
    assert "Wgmma<T, kN," in tested and widths == set(re.findall(r"integral_constant<int, (\d+)>", tested))


def test_every_kernel_of_the_ptx_tests_is_run():
    launchers = set(re.findall(r"^const char\* (\w+)\(", "".join(map(Path.read_text, PTX_TESTS.glob("*.cu"))), re.M))
    run = set(re.findall(r'run\("(\w+)"', (PTX_TESTS.parent / "test_ptx.py").read_text()))
    assert launchers and launchers == run


@needs_nvcc
def test_combine_moves_sixteen_bytes_at_a_time(tmp_path):
    nvcc("-ptx", "-arch=compute_90", CSRC / "combine.cu", "-o", tmp_path / "combine.ptx")
    entries = (tmp_path / "combine.ptx").read_text().split(".entry")[1:]
    assert len(entries) == 18  # three dtypes, K in 1, 2, 4, 6, 8 and any
    for entry in entries:
        top_k = int(re.search(r"combine_kernelI\w+?Li(\d)E", entry)[1])
        assert len(re.findall(r"ld\.global\.cs\.v4\.[ubf]32", entry)) == (top_k or 8)
        assert len(re.findall(r"st\.global\.v4\.[ubf]32", entry)) == 1


@needs_nvcc
def test_permute_reads_a_row_once(tmp_path):
    """Sixteen bytes at a time, and writes it K times; one store more clears the rows of dropped slots."""
    nvcc("-ptx", "-arch=compute_90", CSRC / "permute.cu", "-o", tmp_path / "permute.ptx")
    entries = (tmp_path / "permute.ptx").read_text().split(".entry")[1:]
    assert len(entries) == 18
    for entry in entries:
        assert len(re.findall(r"ld\.global\.nc\.(?:L\S+\.)?v4\.[ubf]32", entry)) == 1
        assert re.search(r"st\.global\.v4\.[ubf]32", entry)
        assert not re.search(r"st\.global\.[ubf](?:16|32)", entry)


@needs_nvcc
def test_routing_plan_waits_for_the_grid_once(tmp_path):
    """One kernel of two index types and two widths of counts, with one barrier over its blocks."""
    nvcc("-ptx", "-arch=compute_90", CSRC / "routing_plan.cu", "-o", tmp_path / "routing_plan.ptx")
    entries = (tmp_path / "routing_plan.ptx").read_text().split(".entry")[1:]
    assert len(entries) == 4
    for entry in entries:
        assert entry.count("atom.add.release.gpu") == 1


# The door


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
    assert "width of 0" in backends.why_not("cuda", "combine", gpu._replace(dims=(64, 0)))


HOPPER = backends.Problem(torch.device("cuda"), torch.bfloat16, (128, 72), block_m=128)


@pytest.mark.parametrize("op", ["gate_up", "grouped_gemm", "d_activation", "grouped_wgrad"])
@pytest.mark.parametrize(
    "capability, change, reason",
    [
        ((9, 0), {}, None),
        ((10, 0), {}, "is for Hopper"),
        ((9, 0), {"dtype": torch.float16}, "takes bfloat16, not float16"),
        ((9, 0), {"block_m": 64}, "the plan has 64"),
        ((9, 0), {"traits": ("float64 result", "another trait")}, "has no float64 result, another trait"),
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


@pytest.mark.parametrize(
    "op, dims, reason",
    [
        ("permute", (2**30 - 8,), None),
        ("permute", (2**30,), "width 1073741824 is not below 2**30"),
        ("gate_up", (2**30 - 64, 2**30 - 8), None),
        ("gate_up", (64, 2**30), "width 1073741824 is not below 2**30"),
        ("grouped_gemm", (2**30, 64), "width 1073741824 is not below 2**30"),
        ("grouped_wgrad", (2**22, 2**22), None),
        ("grouped_wgrad", (2**22 + 8, 64), "widths of at most 2**22, not 4194312"),
        ("grouped_wgrad", (64, 2**22 + 8), "widths of at most 2**22, not 4194312"),
        ("grouped_wgrad", (2**22 + 8,), None),  # the sums alone
        ("grouped_wgrad", (2**30,), "width 1073741824 is not below 2**30"),
    ],
)
def test_the_widest_rows_that_the_kernels_take(extension, monkeypatch, op, dims, reason):
    monkeypatch.setattr("moe_kernels.backends.cuda._device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = backends.why_not("cuda", op, HOPPER._replace(dims=dims))
    assert found is None if reason is None else reason in found


def test_more_that_the_products_of_rows_take(extension, monkeypatch):
    monkeypatch.setattr("moe_kernels.backends.cuda._device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    taken = {
        "grouped_gemm": ("bias", "transposed weights"),
        "grouped_wgrad": ("gather none", "row sums", "float32 result", "accumulation"),
        "gate_up": ("bias", "interleaved gate_up", "transposed weights"),
        "d_activation": ("interleaved gate_up", "transposed weights"),
    }
    for op in ("gate_up", "d_activation"):
        taken[op] += tuple(f"activation {name}" for name in ACTIVATIONS if name != "swiglu")
    for op, traits in taken.items():
        assert backends.why_not("cuda", op, HOPPER._replace(traits=traits)) is None
    sums_alone = HOPPER._replace(dims=(72,), traits=("gather none", "row sums"))
    assert backends.why_not("cuda", "grouped_wgrad", sums_alone) is None


def test_built_without_the_hopper_kernels(extension, monkeypatch):
    monkeypatch.setattr("moe_kernels.backends.cuda._device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    extension.sm90 = False
    assert "without its Hopper kernels" in backends.why_not("cuda", "gate_up", HOPPER)
    del extension.sm90  # of before there were any
    assert "without its Hopper kernels" in backends.why_not("cuda", "gate_up", HOPPER)


# What a launch is given


def test_the_counter_lives_until_the_launch_is_done(monkeypatch):
    counters, alive = [], []
    monkeypatch.setattr(_extension, "num_sms", lambda device: 132)
    monkeypatch.setattr(_extension, "address", lambda tensor: counters.append(weakref.ref(tensor)))
    monkeypatch.setattr(_extension, "launch", lambda *_, **__: alive.append(counters[0]() is not None))
    _extension.launch_sm90("gate_up", torch.device("cpu"))
    assert alive == [True]


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("in_place", [True, False])
def test_d_activation_over_h_wherever_it_lies(extension, monkeypatch, offset, in_place):
    """The kernel needs 16-byte aligned rows; the caller's memory must hold dH afterwards all the same."""
    T, K, E, D, I = 5, 2, 3, 64, 8  # noqa: E741
    memory = torch.ones(T * K * 2 * I + 16, dtype=torch.bfloat16)
    h = memory[offset : offset - 16].view(T * K, 2 * I)
    dh = h if in_place else torch.empty_like(h)

    def kernel(name, device, *, h, dh, **_):
        assert h % 16 == 0 and dh % 16 == 0 and (h == dh) is in_place
        ctypes.memset(dh, 0, T * K * 2 * I * 2)

    monkeypatch.setattr(cuda_d_activation, "launch_sm90", kernel)
    index = torch.zeros(1, 1, dtype=torch.int32)
    cuda_d_activation.d_activation(
        dh, torch.ones(T, D), torch.ones(E, D, I), h, torch.ones(T, K), index[0], index[0], index, 128, "swiglu"
    )
    assert (dh == 0).all() and (h == (0 if in_place else 1)).all()
    assert (memory[:offset] == 1).all() and (memory[offset - 16 :] == 1).all()


@pytest.mark.parametrize("trans_w", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_gemm_reads_weights_as_they_lie(extension, monkeypatch, transposed, trans_w):
    launched = {}
    monkeypatch.setattr(cuda_grouped_gemm, "launch_sm90", lambda *_, **arguments: launched.update(arguments))
    w = torch.empty((3, 8, 16) if trans_w != transposed else (3, 16, 8))
    given = w.mT if transposed else w  # [E, 8, 16] = [E, N, C] with trans_w, else [E, 16, 8] = [E, C, N]
    index = torch.zeros(2, 1, dtype=torch.int32)
    y = cuda_grouped_gemm.grouped_gemm(torch.empty(5, 16), given, torch.empty(3, 8), index[:, 0], index, 128, trans_w)
    assert y.shape == (5, 8)
    assert launched["w"].data == w.data_ptr() and (launched["w"].rows, launched["w"].columns) == w.shape[1:]
    assert launched["across"] is (trans_w == transposed)  # the reduction, 16, runs across the rows that lie in memory

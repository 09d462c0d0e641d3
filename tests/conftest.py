"""Fixtures of every test: where an op runs, a stand-in for the extension, poisoned memory, a counter of op calls, the
gpu marker.

Without a GPU the Triton kernels run in Triton's interpreter. ``@triton.jit`` decides what it makes when a module is
imported, so triton and the kernels are imported here under TRITON_INTERPRET=1; the variable is then taken back, and
only a test whose target is Triton on the CPU sees it again. Everything else resolves as on any machine without a GPU.
"""

import collections
import contextlib
import importlib
import os
import pkgutil
import sys

import pytest
import torch
from torch._ops import HigherOrderOperator
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

#: Inductor's cache takes a graph for known whatever an op's fake says by now.
torch.compiler.config.force_disable_caches = True

HAS_CUDA = torch.cuda.is_available()
_INTERPRET = "TRITON_INTERPRET"

if not HAS_CUDA:
    _before = os.environ.get(_INTERPRET)
    os.environ[_INTERPRET] = "1"
    with contextlib.suppress(ImportError):  # no triton on this platform: its targets are then skipped with the reason
        import triton.language  # noqa: F401

        import moe_kernels.backends.triton as _kernels

        for _module in pkgutil.iter_modules(_kernels.__path__):
            importlib.import_module(f"{_kernels.__name__}.{_module.name}")
    if _before is None:
        del os.environ[_INTERPRET]

from moe_kernels import backends, use_backend  # noqa: E402
from moe_kernels.backends.cuda import _extension  # noqa: E402
from tests.helpers import Target  # noqa: E402


def pytest_configure(config):
    # Triton's interpreter under a recent numpy, thousands of times
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")


def pytest_collection_modifyitems(items):
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# Where an op runs

CPU_TARGETS = [Target(backend, "cpu", torch.float32) for backend in ("reference", "triton")]
# The reference is plain torch: one dtype shows that it runs there.
GPU_TARGETS = [Target("reference", "cuda", torch.bfloat16)] + [
    Target(backend, "cuda", dtype)
    for backend in ("triton", "cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


#: Ops without floating data: one dtype says it all.
WITHOUT_FLOATS = ("routing_plan",)


def pytest_generate_tests(metafunc):
    """A test that takes ``target`` runs once for every backend that implements its module's ``OP``."""
    if "target" not in metafunc.fixturenames:
        return
    op = metafunc.module.OP
    gpu_targets = [t for t in GPU_TARGETS if op not in WITHOUT_FLOATS or t.dtype == torch.bfloat16]
    targets = [pytest.param(t, id=str(t)) for t in CPU_TARGETS if op in backends.IMPLEMENTS[t.backend]]
    targets += [
        pytest.param(t, id=str(t), marks=pytest.mark.gpu) for t in gpu_targets if op in backends.IMPLEMENTS[t.backend]
    ]
    metafunc.parametrize("target", targets, indirect=True)


@pytest.fixture
def target(request, monkeypatch):
    """The target with its backend forced."""
    target = request.param
    if target == Target("triton", "cpu", torch.float32):
        if HAS_CUDA:
            pytest.skip("the kernels are compiled for the GPU here, not interpreted")
        monkeypatch.setenv(_INTERPRET, "1")
    _forget_choices()
    dims = (64, 64)
    reason = backends.why_not(
        target.backend, request.module.OP, backends.Problem(torch.device(target.device), target.dtype, dims)
    )
    if reason is not None:
        pytest.skip(reason)
    with use_backend(target.backend):
        yield target
    monkeypatch.undo()
    _forget_choices()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A forced backend may decline a case of its op: that is said as the reason of a skip.

    What a backend must not decline, its own tests hold (tests/gpu/test_hopper.py).
    """
    try:
        return (yield)
    except RuntimeError as error:
        if "target" in pyfuncitem.fixturenames and backends.DECLINED in str(error):
            pytest.skip(str(error))
        raise


def _forget_choices():
    """What the device can run depends on the interpreter's variable, which the library reads once."""
    backends._resolve.cache_clear()
    backends._can.cache_clear()
    for backend in backends.ORDER:
        module = importlib.import_module(f"moe_kernels.backends.{backend}")
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.fixture
def extension(monkeypatch):
    """A stand-in for ``_C``, so that what depends on it alone can be tested where it isn't built."""

    class Extension:
        NONE, FLOAT32, BFLOAT16, FLOAT16 = range(4)
        architectures = "80,90,100,120"
        cuda_version = "13.0"
        driver_version = staticmethod(lambda: 13000)
        sm90 = True
        TILE_N = 256
        ACTIVATIONS = {"swiglu": (0, True)}  # noqa: RUF012  as the module has it
        Plan = collections.namedtuple("Plan", "offsets slots tiles num_tiles num_experts num_rows top_k")
        Weights = collections.namedtuple("Weights", "data rows columns row_stride expert_stride")

    def forget():
        _forget_choices()
        for function in (_extension.unavailable, _extension.dtype_codes, _extension._activations):
            function.cache_clear()

    monkeypatch.setattr(_extension, "_load", lambda: Extension)
    forget()
    yield Extension
    monkeypatch.undo()
    forget()


# Poison

#: Far outside any index, and unlike any count or offset a test can produce.
POISON_INTEGER = 0x3A3A3A3A


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.Tensor or tensor.device.type == "meta":
        return tensor  # FakeTensor and friends
    if tensor.dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    return tensor.fill_(POISON_INTEGER if tensor.dtype.itemsize >= 4 else 1)


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory that the library asks for comes back as NaN or as a garbage integer.

    Fresh memory is often zero, so a kernel that leaves out a row passes by luck; this takes the luck away.
    """

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return poison_(tensor) if caller.startswith("moe_kernels.") else tensor

        return wrapper

    # torch.device("meta") as a context looks for these functions in a set made at its first use: not ours.
    _device._device_constructors()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


# Which ops ran


class OpCounter(TorchDispatchMode):
    """Counts calls of ``torch.ops.moe_kernels.*``, keeps the dtypes of their tensors and the shape of what comes back
    (of the first tensor, where there are more)."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.dtypes = collections.defaultdict(list)
        self.shapes = collections.defaultdict(list)

    @classmethod
    def supports_higher_order_operators(cls):
        return True  # compiled code wraps an op that writes into an argument: auto_functionalized_v2(op, ...)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        op = args[0] if isinstance(function, HigherOrderOperator) and args else function
        result = function(*args, **(kwargs or {}))
        if getattr(op, "namespace", None) == "moe_kernels":
            name = op.__name__.partition(".")[0]
            self.calls[name] += 1
            self.dtypes[name].append([a.dtype for a in args if isinstance(a, torch.Tensor)])
            first = result[0] if isinstance(result, (tuple, list)) else result
            self.shapes[name].append(None if first is None else list(first.shape))
        return result


@pytest.fixture
def op_counter():
    """An :class:`OpCounter`; use it as ``with op_counter: ...``."""
    return OpCounter()

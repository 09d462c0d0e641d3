"""How far a result may be from the truth: the one table of tolerances, and the checks that use it."""

from collections.abc import Callable

import torch
from torch import Tensor

#: Largest relative L2 error of a full-precision result against the fp64 truth. fp32 (eps 1.2e-7): sums of up to a few
#: thousand terms in any order stay near 1e-6, a TF32 product or a bf16 round trip is at 1e-3. fp64: the same, scaled.
RELATIVE_L2 = {torch.float32: 1e-5, torch.float64: 1e-12}

#: A half-precision result may be this many times worse than plain torch in that dtype: one rounding in another place.
TIMES_PLAIN = 2
#: And this far off where plain torch is exact, a tenth of the dtype's own rounding (eps / sqrt(12), relative L2).
FLOOR = {torch.bfloat16: 2e-4, torch.float16: 3e-5}

#: Largest single error as a multiple of the L2 limit, against the largest element: one wrong element in a large tensor
#: does not move an L2 norm. Maxima over 10^6 roundings lie within 5 standard deviations, doubled.
WORST_ELEMENT = 10


def relative_l2(actual: Tensor, truth: Tensor) -> float:
    actual, truth = actual.detach().double(), truth.detach().double()
    if truth.numel() == 0:
        return 0.0
    scale = truth.norm().item()
    return (actual - truth).norm().item() / (scale if scale > 0 else 1.0)


def assert_close(actual: Tensor, truth: Tensor, plain: Tensor | None = None, what: str = "result") -> None:
    """Within the tables above; ``plain`` is what torch makes of the same formula in the dtype of ``actual``."""
    with Together() as checks:
        checks.close(actual, truth, plain, what)


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Equal including NaN payloads: unwritten elements are poison in both."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


class Together:
    """Checks of tensors on one device whose numbers come to the host in one copy, when the block ends.

    Every number that is asked of a GPU waits for its turn there: beside other processes that takes milliseconds, far
    more than the kernels of a small problem. Raises what the first check that fails has to say.
    """

    def __init__(self):
        self._numbers: list[Tensor] = []  # fp64, one dimension each
        self._judges: list[Callable[[list[float]], None]] = []

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None and self._numbers:
            numbers = iter(torch.cat(self._numbers).tolist())
            for tensor, judge in zip(self._numbers, self._judges, strict=True):
                judge([next(numbers) for _ in range(tensor.numel())])

    def close(self, actual: Tensor, truth: Tensor, plain: Tensor | None = None, what: str = "result") -> None:
        """As :func:`assert_close`."""
        assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
        if truth.numel() == 0:
            return
        dtype = actual.dtype
        actual, truth = actual.detach().double(), truth.detach().double()
        error = actual - truth
        numbers = [truth.norm(), error.norm(), error.abs().max(), truth.abs().max()]
        if dtype not in RELATIVE_L2:
            numbers.append((plain.detach().double() - truth).norm())
        self.ask(torch.stack(numbers), lambda found: _judge_distances(dtype, what, *found))

    def true(self, condition: Tensor, message: str) -> None:
        """``condition``, a bool of no dimension, is true."""

        def judge(found: list[float]) -> None:
            assert found == [1], message

        self.ask(condition.double().view(1), judge)

    def same_bits(self, a: Tensor, b: Tensor, message: str) -> None:
        """As :func:`bitwise_equal`."""
        assert a.dtype == b.dtype and a.shape == b.shape, message
        self.true((_bits(a) == _bits(b)).all(), message)

    def ask(self, numbers: Tensor, judge: Callable[[list[float]], None]) -> None:
        """``judge`` gets these numbers, fp64 in one dimension, when the block ends, and raises if they won't do."""
        self._numbers.append(numbers)
        self._judges.append(judge)


def _judge_distances(dtype, what, size, error, worst, largest, of_plain=0.0) -> None:
    """Of NaN every comparison is false: it fails."""
    scale = size if size > 0 else 1.0
    limit = RELATIVE_L2[dtype] if dtype in RELATIVE_L2 else TIMES_PLAIN * of_plain / scale + FLOOR[dtype]
    assert error / scale <= limit, f"{what}: relative L2 error {error / scale:.2e}, allowed {limit:.2e}"
    largest = 1.0 if largest == 0 else max(largest, 1e-30)
    assert worst <= WORST_ELEMENT * limit * largest, f"{what}: one element is off by {worst:.2e}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])

"""The wrappers of Hopper's instructions (csrc/ptx), each alone in a kernel of tests/gpu/ptx, exactly.

The kernels are compiled here, without torch. A kernel whose wait has to give up takes a second and gives wrong
results, so a wrapper that doesn't work fails its own test and the others that need it.
"""

import ctypes
import itertools
import random
import shutil

import pytest
import torch

from tests.nvcc import CSRC, nvcc

pytestmark = pytest.mark.gpu

KERNELS = CSRC.parent / "tests" / "gpu" / "ptx"
NAN = float("nan")
#: DType of csrc/dtype.h
CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the instructions are for compute capability 9.0")
    path = tmp_path_factory.mktemp("ptx") / "ptx.so"
    how = ("-gencode=arch=compute_90a,code=sm_90a", "--shared", "-Xcompiler=-fPIC", "--cudart=static", "--threads=0")
    nvcc(*how, *sorted(KERNELS.glob("*.cu")), CSRC / "tensor_map.cpp", "-o", path)
    return ctypes.CDLL(str(path))


@pytest.fixture
def run(library):
    """Calls a function of the library with tensors and ints, and waits for its kernel."""
    torch.manual_seed(0)

    def run(name, *arguments):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else int(a) for a in arguments]
        error = function(*values, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        assert error is None, error.decode()
        torch.cuda.synchronize()

    return run


def poisoned(*shape, dtype=torch.int32):
    return torch.full(shape, NAN if dtype.is_floating_point else -1, dtype=dtype, device="cuda")


def bits(*shape, dtype=torch.int32):
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, dtype=dtype, device="cuda")


def integers(*shape, dtype=torch.bfloat16):
    """Small enough that every product and sum is exact."""
    return torch.randint(-8, 9, shape, device="cuda").to(dtype)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# mbarrier.cuh


def test_mbarrier_phases(run):
    over = poisoned(5, 7)
    run("mbarrier_phases", over, 5)
    # Nothing, one arrival, one with 48 bytes announced, two more, 16 bytes, 32 bytes; then the next phase.
    assert over.tolist() == [[0, 0, 0, 0, 0, 1, 0]] * 5


def test_mbarrier_wait(run):
    rounds = 64
    seen = poisoned(rounds, 128)
    run("mbarrier_wait", seen, rounds)
    assert seen.tolist() == [[r * 32 + (t + r) % 32 for t in range(128)] for r in range(rounds)]


# cluster.cuh


def test_cluster(run):
    """cluster_rank, cluster_sync and address_in."""
    ranks, seen = poisoned(6), poisoned(6, 2, 128)
    run("cluster", ranks, seen, 6)
    assert ranks.tolist() == [0, 1] * 3
    written = torch.arange(6 * 128, device="cuda", dtype=torch.int32).view(3, 1, 2, 128)
    assert_same(seen, written.expand(3, 2, 2, 128).reshape(6, 2, 128))


def test_mbarrier_arrive_in(run):
    over = poisoned(6, 3)
    run("mbarrier_arrive_in", over, 6)
    # Block 0 to block 1, each to itself, block 1 to block 0; the other block's phase goes on each time.
    assert over.tolist() == [[0, 1, 1], [1, 1, 0]] * 3


def test_store_async_in(run):
    sent, received = bits(6, 32, 4), poisoned(6, 2, 32, 4)
    run("store_async_in", received, sent, 6)
    assert_same(received, sent.view(3, 1, 2, 32, 4).expand(3, 2, 2, 32, 4).reshape(6, 2, 32, 4))


# copy.cuh, the copy engine

CORNERS = [(0, 0, 0), (64, 8, 2), (8, 20, 1)]  # inside; over every edge; all of it beyond the rows
SIZES, STRIDES = (3, 20, 72), (1616, 80, 1)


def tensor(dtype):
    """A tensor with poison between its rows and matrices, and the memory it lies in."""
    memory = poisoned(3 * STRIDES[0], dtype=dtype)
    return memory.as_strided(SIZES, STRIDES), memory


def tensor_map(x):
    size2, size1, size0 = x.shape
    return (x, CODES[x.dtype], size0, size1, size2, x.stride(1), x.stride(0))


def check_load(run, x, corner):
    c0, c1, c2 = corner
    columns = 128 // x.element_size()
    box = poisoned(2, 16, columns, dtype=x.dtype)
    run("tma_load", box, *tensor_map(x), *corner)
    expected = torch.zeros_like(box)
    inside = x[c2 : c2 + 2, c1 : c1 + 16, c0 : c0 + columns]
    expected[tuple(map(slice, inside.shape))] = inside
    assert_same(box, expected)


@pytest.mark.parametrize("corner", CORNERS, ids=str)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_tma_load(run, dtype, corner):
    """A box, swizzled as ``swizzled()`` says, with zeros for what is outside."""
    x, _ = tensor(dtype)
    check_load(run, x.normal_(), corner)


@pytest.mark.parametrize(
    "sizes, strides", [((1, 20, 72), (3, 80, 1)), ((1, 1, 72), (5, 3, 1)), ((3, 1, 72), (1616, 3, 1))], ids=str
)
def test_tma_load_whatever_the_stride_of_size_one(run, sizes, strides):
    _, memory = tensor(torch.bfloat16)
    check_load(run, memory.normal_().as_strided(sizes, strides), (0, 0, 0))


def test_tma_load_multicast(run):
    chunks = torch.randn(3, 64, 64, dtype=torch.bfloat16, device="cuda")
    landed = poisoned(2, 3, 64, 64, dtype=torch.bfloat16)
    run("tma_load_multicast", landed, chunks)
    assert_same(landed[:, :2], chunks[:2].expand(2, 2, 64, 64))  # one of each block to both
    assert_same(landed[1, 2], chunks[2])  # from block 0 to block 1
    assert landed[0, 2].isnan().all()


@pytest.mark.parametrize("corner", CORNERS, ids=str)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_tma_store(run, dtype, corner):
    """A box, what is outside left out: neither the rows beyond nor what lies between the rows is written."""
    c0, c1, c2 = corner
    x, memory = tensor(dtype)
    box = torch.randn(2, 16, 128 // x.element_size(), device="cuda").to(dtype)
    address, *shape = tensor_map(x)
    run("tma_store", address, box, *shape, *corner, False)
    expected = torch.full_like(memory, NAN)
    inside = expected.as_strided(SIZES, STRIDES)[c2 : c2 + 2, c1 : c1 + 16, c0 : c0 + box.shape[2]]
    inside.copy_(box[tuple(map(slice, inside.shape))])
    assert_same(memory, expected)


@pytest.mark.parametrize("corner", CORNERS, ids=str)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_tma_add(run, dtype, corner):
    """A box added to what is there, rounded once; what is outside, and what lies between the rows, stays."""
    c0, c1, c2 = corner
    x, memory = tensor(dtype)
    memory.copy_(torch.randn(memory.shape, device="cuda"))
    box = torch.randn(2, 16, 128 // x.element_size(), device="cuda").to(dtype)
    expected = memory.clone()
    inside = expected.as_strided(SIZES, STRIDES)[c2 : c2 + 2, c1 : c1 + 16, c0 : c0 + box.shape[2]]
    inside.add_(box[tuple(map(slice, inside.shape))])
    address, *shape = tensor_map(x)
    run("tma_store", address, box, *shape, *corner, True)
    assert_same(memory, expected)


def test_elect(run):
    """One lane of each warp, the same one every time."""
    elected = poisoned(2, 4, 32)
    run("elect", elected, 4)
    assert (elected >= 0).all() and (elected.sum(dim=2) == 1).all() and (elected[0] == elected[1]).all()


@pytest.mark.parametrize("buffers", [1, 2])
def test_bulk_groups(run, buffers):
    """bulk_commit; bulk_wait_read: a buffer is free again; bulk_wait: what was sent has arrived."""
    boxes, seen = poisoned(32, 256, 32, dtype=torch.float32), poisoned(256, dtype=torch.float32)
    run("bulk_groups", boxes, seen, buffers)
    numbers = torch.arange(1.0, 33.0, device="cuda").view(32, 1, 1)
    assert_same(boxes, numbers.expand_as(boxes).contiguous())
    assert (seen == 32).all()


# copy.cuh, single threads and warps


def test_cp_async(run):
    """cp_async_16, cp_async_16_or_zero and mbarrier_arrive_after_copies."""
    pieces, copied = bits(1024, 4), torch.rand(1024, device="cuda") < 0.5
    landed = poisoned(2, 1024, 4)
    run("cp_async", landed, pieces, copied)
    assert_same(landed[0], pieces)
    assert_same(landed[1], pieces * copied[:, None])


def rows_of(matrices):
    """Four 8x8 matrices where the kernels place their rows."""
    rows = torch.empty(32, 8, dtype=matrices.dtype, device="cuda")
    rows[5 * torch.arange(32, device="cuda") % 32] = matrices.reshape(32, 8)
    return rows


@pytest.mark.parametrize("transposed", [False, True], ids=["upright", "transposed"])
def test_stmatrix(run, transposed):
    words = bits(32, 4, 2, dtype=torch.int16)  # [lane, matrix, element of the pair]
    matrices = words.transpose(0, 1).reshape(4, 8, 8)  # lanes 4r to 4r + 3 have row r
    rows = poisoned(32, 8, dtype=torch.int16)
    run("stmatrix", rows, words, transposed)
    assert_same(rows, rows_of(matrices.mT if transposed else matrices))


def test_ldmatrix(run):
    matrices = bits(4, 8, 8, dtype=torch.int16)
    words = poisoned(32, 4, 2, dtype=torch.int16)
    run("ldmatrix", words, rows_of(matrices))
    assert_same(words, matrices.view(4, 32, 2).transpose(0, 1).contiguous())


# mma.cuh, wgmma.cuh


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma(run, dtype):
    a, b, c = integers(16, 16, dtype=dtype), integers(16, 8, dtype=dtype), integers(16, 8, dtype=torch.float32)
    expected = c + a.float() @ b.float()
    run("mma", c, a, b.T.contiguous(), dtype == torch.float16)
    assert_same(c, expected)


def in_steps(operand, across):
    """An operand [width, reduction] as it lies in shared memory: steps of rows of 64 elements.

    Along: 64 of the reduction a row. Across: blocks of 64 of the width, one row for each of the reduction.
    """
    if not across:
        return operand.unflatten(1, (-1, 64)).transpose(0, 1).contiguous()
    return operand.unflatten(1, (-1, 64)).unflatten(0, (-1, 64)).permute(2, 0, 3, 1).contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("across_a", [False, True], ids=["a-along", "a-across"])
@pytest.mark.parametrize(
    "width,across_b",  # across, columns come in chunks of 64
    [(192, False), (192, True), (208, False), (256, False), (256, True)],
)
def test_wgmma(run, width, across_a, across_b, steps, accumulate, dtype):
    """Wgmma, its descriptors, fences and groups; fence_async_proxy, as ordinary stores write the operands."""
    a, b = integers(64, 64 * steps, dtype=dtype), integers(width, 64 * steps, dtype=dtype)
    c = integers(64, width, dtype=torch.float32) if accumulate else poisoned(64, width, dtype=torch.float32)
    expected = a.float() @ b.float().T + (c if accumulate else 0)
    operands = in_steps(a, across_a), in_steps(b, across_b)
    run("wgmma", c, *operands, steps, accumulate, across_a, across_b, width, dtype == torch.float16)
    assert_same(c, expected)


# registers.cuh


def test_registers(run):
    """give_registers and take_registers: a thread holds more than its share of the block's."""
    values = bits(192, 256)
    expected = values.flip(0)
    run("registers", values)
    assert_same(values, expected)


# sm90/pipeline.cuh


DIVISORS = [1, 2, 3, 5, 6, 7, 8, 10, 63, 64, 65, 641, 1000, 2**16 - 1, 2**16, 2**16 + 1, 2**30, 2**30 + 1, 2**31 - 1]


@pytest.mark.parametrize("d", DIVISORS)
def test_divide(run, d):
    last = 2**31 - 1
    near = [multiple + i for multiple in (0, d, last // 2 // d * d, last // d * d, last) for i in (-2, -1, 0, 1, 2)]
    numbers = [n for n in near if 0 <= n <= last] + random.Random(d).sample(range(last), 1000)
    quotients = poisoned(len(numbers))
    run("divide", quotients, torch.tensor(numbers, dtype=torch.int32, device="cuda"), len(numbers), d)
    assert quotients.tolist() == [n // d for n in numbers]


# sm90/longest_first.cuh


#: Rows of an expert, by a Random.
ROWS = {
    "random": lambda chooser: chooser.randrange(10_000),
    "some-empty": lambda chooser: chooser.randrange(2) * chooser.randrange(1000),
    "all-empty": lambda chooser: 0,
    "ties": lambda chooser: 64 * chooser.randrange(4) + chooser.choice([0, 1, 63]),
}
EXPERTS = pytest.mark.parametrize("num_experts", [1, 3, 96, 97, 511, 512])


def check_longest_first(run, rows):
    """By steps of 64 rows, most first; of experts with equally many the lower id first."""
    offsets = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device="cuda")
    order = poisoned(len(rows))
    run("longest_first", order, offsets, len(rows))
    steps = [min(-(-r // 64), 2**23 - 1) for r in rows]  # as many as a key has room for
    assert order.tolist() == sorted(range(len(rows)), key=lambda e: (-steps[e], e))


@EXPERTS
@pytest.mark.parametrize("rows", ROWS)
def test_longest_first(run, rows, num_experts):
    chooser = random.Random(num_experts)
    check_longest_first(run, [ROWS[rows](chooser) for _ in range(num_experts)])


@EXPERTS
def test_longest_first_of_more_steps_than_a_key_holds(run, num_experts):
    longest = (2**29 - 128, 2**29, 2**29 - 64)[:num_experts]  # a step less than the most, one more, the most
    check_longest_first(run, [*range(num_experts - len(longest)), *longest])

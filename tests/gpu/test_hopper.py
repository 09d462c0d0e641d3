"""The Hopper kernels of the CUDA backend, each forced: no case here may fall back to another backend.

The cases are about their tiles: 128 rows in pairs, 256 columns (128 with a gate; 192 or 208 where consumers take
turns), 64 of the reduction; rings of four stages; experts that end inside a tile, a pair or a step; more tiles than
blocks. Weight gradients have tiles of their own (TALL_TILES). Random problems: test_soak.py.
"""

import pytest
import torch

from moe_kernels import use_backend
from tests import helpers
from tests.gpu.hopper import BF16, How, check, products, why_not
from tests.helpers import Case, Problem, assert_close, bitwise_equal

pytestmark = pytest.mark.gpu

ops = torch.ops.moe_kernels


@pytest.fixture(autouse=True)
def forced():
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with use_backend("cuda"):
        yield


CASES = [
    Case(1, 1, 1, 64, 8, block_m=128),  # one row, one step, one piece of a chunk
    Case(128, 1, 1, 64, 64, block_m=128),  # exactly a tile
    Case(129, 1, 1, 128, 64, block_m=128),  # one row in the second tile of a pair
    Case(64, 1, 1, 192, 256, block_m=128),  # the second consumer has no rows
    Case(640, 1, 2, 64, 264, block_m=128),  # a column tile of 8
    Case(700, 2, 3, 320, 520, block_m=128),  # pairs of two experts
    Case(400, 4, 40, 256, 72, block_m=128),  # most experts less than a tile
    Case(300, 2, 6, 128, 136, routing="all_to_one", block_m=128),
    Case(300, 2, 9, 128, 72, routing="empty", block_m=128),
    Case(300, 3, 5, 128, 72, routing="sentinels", block_m=128),
    Case(300, 4, 3, 128, 72, routing="duplicates", block_m=128),
    Case(100, 2, 4, 128, 72, routing="all_dropped", block_m=128),
    Case(3000, 2, 4, 512, 1032, block_m=128),  # more tiles than blocks: the rings go round
    Case(700, 3, 7, 832, 200, block_m=128),  # down in turn, 208 columns a tile
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, poison):
    check(case)


#: Widths of whole steps of 64, not of whole tiles; experts of any number of rows, and of none; what a small tile hides.
FAMILY_SIZES = [
    Case(600, 2, 8, 128, 192, routing="empty", block_m=128),
    Case(500, 3, 5, 192, 320, routing="sentinels", block_m=128),
    Case(300, 2, 3, 64, 8, block_m=128),
]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("activation,interleaved", helpers.LAYOUTS)
@pytest.mark.parametrize("case", FAMILY_SIZES, ids=str)
def test_layouts_and_activations(case, activation, interleaved, transposed, bias, poison):
    check(case._replace(activation=activation, interleaved=interleaved), transposed, bias)


@pytest.mark.parametrize(
    "case,transposed,bias",
    [
        (Case(1500, 4, 8, 2880, 2880, "swiglu_oai", block_m=128, interleaved=True), True, True),  # gpt-oss
        (Case(1500, 6, 16, 2688, 1856, "relu2", block_m=128), False, False),  # Nemotron-3 Nano
        (Case(1500, 8, 16, 1024, 2688, "relu2", block_m=128), False, False),  # Nemotron-3 Super, latent
        (Case(1500, 4, 8, 2048, 2048, "swiglu_clamp_before", block_m=128), False, False),
        (Case(1500, 1, 8, 5120, 1024, block_m=128), True, False),  # Llama 4
    ],
    ids=str,
)
def test_families(case, transposed, bias, poison):
    check(case, transposed, bias)


#: Weight gradients of pairs of tiles of 256 by 192 (D by I and 2 * I), where those cover less than 128 by 256 would.
TALL_TILES = [
    Case(700, 2, 3, 512, 192, block_m=128),  # exactly a pair, of one column tile and of two
    Case(700, 2, 3, 576, 136, block_m=128),  # a pair without columns for its second tile
    Case(700, 2, 3, 840, 144, block_m=128),  # with 72: a chunk and eight
    Case(300, 2, 9, 512, 136, routing="empty", block_m=128),
]

#: About twenty tiles a cluster, most of one step: the ring of eight published tiles goes round while others draw.
MANY_TILES = [
    Case(40000, 2, 64, 64, 392, block_m=128),  # gate_up: the shortest reduction
    Case(40000, 2, 64, 1024, 64, block_m=128),  # down
    Case(40000, 2, 64, 832, 64, block_m=128),  # down in turn, 208 columns a tile
    Case(40000, 2, 64, 576, 32, block_m=128),  # down and dX in turn, 192 columns a tile
    Case(6000, 2, 300, 576, 32, block_m=128),  # the same, experts of 40 rows: half a tile each
    Case(8000, 2, 1024, 256, 136, block_m=128),  # weight gradients: few rows an expert
    Case(4000, 2, 512, 512, 136, block_m=128),  # the same in tall tiles, with a ring of three stages
    Case(200, 2, 4, 4160, 2056, block_m=128),  # wide weight gradients
]


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_many_tiles(case, poison):
    check(case)


@pytest.mark.parametrize("case", [CASES[4], CASES[5], CASES[8]], ids=str)
def test_float32_weight_gradients(case, poison):
    """Of fp32 parameters under autocast: rounded nowhere."""
    p = Problem(case, "cuda", BF16)
    for lhs, rhs, gather in ((p.h, p.x, "rhs"), (p.d_out, p.a, "lhs")):
        rows = (lhs[p.token_r], rhs) if gather == "lhs" else (lhs, rhs[p.token_r])
        dw, _ = ops.grouped_wgrad(lhs, rhs, *p.plan[:2], case.K, gather, False, torch.float32)
        assert dw.dtype == torch.float32
        assert_close(dw, helpers.grouped_wgrad(p, *helpers.doubled(*rows))[0], what=gather)


WIDE = Case(500, 4, 5, 2880, 960, block_m=128)  # gpt-oss: a last column tile of 64


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("trans_w", [True, False], ids=["w-ENC", "w-ECN"])
@pytest.mark.parametrize("case", [*CASES, WIDE], ids=str)
def test_rows_with_a_bias_by_weights_stored_either_way(case, trans_w, transposed, bias, poison):
    p = Problem(case, "cuda", BF16)
    w = p.w_down if trans_w else p.w_down.mT.contiguous()
    w = w.mT.contiguous().mT if transposed else w
    b = p.bias_down if bias else None
    y = ops.grouped_gemm(p.a, w, b, p.plan.offsets_E1, p.plan.tiles_2M, p.plan.block_m, trans_w)
    truth = helpers.grouped_gemm(p, *helpers.doubled(p.a, w, b), trans_w)
    assert_close(y[: p.kept], truth, helpers.grouped_gemm(p, p.a, w, b, trans_w))


def test_a_bias_that_is_not_aligned_or_a_slice():
    p = Problem(Case(200, 2, 3, 520, 136, block_m=128), "cuda", BF16)
    plan = p.plan.offsets_E1, p.plan.tiles_2M, p.plan.block_m
    expected = ops.grouped_gemm(p.a, p.w_down, p.bias_down, *plan, True)[: p.kept]
    wide = torch.full((3, 600), torch.nan, device="cuda", dtype=BF16)
    for start in (3, 8):
        wide[:, start : start + 520] = p.bias_down
        y = ops.grouped_gemm(p.a, p.w_down, wide[:, start : start + 520], *plan, True)
        assert bitwise_equal(y[: p.kept], expected)
    for columns in (slice(256, 512), slice(512, 520), slice(64, 328)):
        y = ops.grouped_gemm(p.a, p.w_down[:, columns], p.bias_down[:, columns], *plan, True)
        assert bitwise_equal(y[: p.kept], expected[:, columns].contiguous())
    y = ops.grouped_gemm(p.a, p.w_down, p.bias_down[:1].expand(3, 520), *plan, True)
    same = ops.grouped_gemm(p.a, p.w_down, p.bias_down[:1].repeat(3, 1), *plan, True)
    assert bitwise_equal(y[: p.kept], same[: p.kept])


#: Chunks of 256 rows: experts that end in one, share one, own many; more experts than a block has threads.
SUMS = [
    *CASES,
    *TALL_TILES,
    WIDE,
    Case(256, 1, 1, 64, 64, block_m=128),
    Case(257, 1, 1, 64, 264, block_m=128),
    Case(40000, 2, 8, 264, 64, routing="all_to_one", block_m=128),
    Case(3000, 2, 1000, 64, 72, block_m=128),
    Case(3000, 2, 600, 64, 72, routing="empty", block_m=128),
]


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("gather", ["none", "lhs", "rhs"])
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_weight_gradients_with_row_sums(case, gather, dtype, poison):
    p = Problem(case, "cuda", BF16)
    lhs, rhs = {"none": (p.y, p.a), "lhs": (p.d_out, p.a), "rhs": (p.h, p.x)}[gather]
    rest = (*p.plan[:2], case.K, gather, True, dtype)
    found = ops.grouped_wgrad(lhs, rhs, *rest)
    rows = lhs[p.token_r] if gather == "lhs" else lhs, rhs[p.token_r] if gather == "rhs" else rhs
    truth, plain = helpers.grouped_wgrad(p, *helpers.doubled(*rows)), helpers.grouped_wgrad(p, *rows)
    assert found[0].dtype == found[1].dtype == dtype
    # In bf16 also where it is fp32: tensor cores drop low bits of a sum over many rows
    assert_close(found[0].to(BF16), truth[0], plain[0], "dW")
    assert_close(found[1], truth[1], plain[1], "db")
    alone = ops.grouped_wgrad(lhs, rhs[:, :0], *rest)[1]
    again = ops.grouped_wgrad(lhs, rhs, *rest)
    assert bitwise_equal(alone, found[1]), "the sums alone"
    assert all(map(bitwise_equal, again, found)), "a rerun"


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("gather", ["none", "lhs", "rhs"])
@pytest.mark.parametrize("case", [*CASES, *TALL_TILES, WIDE, *MANY_TILES], ids=str)
def test_accumulated_weight_gradients(case, gather, dtype, poison):
    """Each element is added to once, with the rounding of torch's own addition; nothing beside them is touched."""
    p = Problem(case, "cuda", BF16)
    lhs, rhs = {"none": (p.y, p.a), "lhs": (p.d_out, p.a), "rhs": (p.h, p.x)}[gather]
    rest = (*p.plan[:2], case.K, gather)
    dw, _ = ops.grouped_wgrad(lhs, rhs, *rest, False, dtype)
    memory = torch.randn(dw.numel() + 1024, device="cuda").to(dtype)
    expected = memory.clone()
    expected[512:-512] += dw.flatten()
    ops.grouped_wgrad_(lhs, rhs, *rest, memory[512:-512].view_as(dw))
    assert bitwise_equal(memory, expected)


def test_accumulation_leaves_empty_experts_alone(poison):
    p = Problem(Case(300, 2, 9, 128, 72, routing="empty", block_m=128), "cuda", BF16)
    into = torch.full((9, 144, 128), torch.nan, device="cuda", dtype=BF16)
    empty = p.plan.tokens_per_expert_E == 0
    into[~empty] = 0
    ops.grouped_wgrad_(p.h, p.x, *p.plan[:2], p.case.K, "rhs", into)
    assert into[empty].isnan().all() and into[~empty].isfinite().all()


def test_empty_experts_get_zeros(poison):
    p = Problem(Case(300, 2, 9, 128, 72, routing="empty", block_m=128), "cuda", BF16)
    empty = p.plan.tokens_per_expert_E == 0
    assert empty.any()
    found = products(p)
    assert (found["dW_gate_up"][empty] == 0).all() and (found["dW_down"][empty] == 0).all()


@pytest.mark.parametrize(
    "case",
    [
        *[CASES[5], CASES[6], CASES[12], CASES[13]],
        Case(2000, 4, 8, 192, 320, "swiglu_oai", block_m=128, interleaved=True),
        Case(2000, 4, 8, 192, 320, "relu2", block_m=128),
    ],
    ids=str,
)
def test_reruns_are_bitwise_equal(case):
    """Blocks draw their tiles in an order that depends on timing; the results must not."""
    p = Problem(case, "cuda", BF16)
    expected = products(p)
    for _ in range(10):
        for name, result in products(p).items():
            assert bitwise_equal(result, expected[name]), name


@pytest.mark.parametrize("activation,interleaved", helpers.LAYOUTS)
def test_over_h_gives_the_same_bits(activation, interleaved):
    p = Problem(CASES[5]._replace(activation=activation, interleaved=interleaved), "cuda", BF16)
    rest = (p.weights, *p.plan[:2], p.plan.tiles_2M, p.plan.block_m, activation, *p.case.options)
    dh, *apart = ops.d_activation(p.d_out, p.w_down, p.h, *rest)
    h = p.h.clone()
    over = ops.d_activation_(p.d_out, p.w_down, h, *rest)
    assert bitwise_equal(h[: p.kept], dh[: p.kept])
    assert bitwise_equal(over[0][: p.kept], apart[0][: p.kept]) and bitwise_equal(over[1], apart[1])


def test_h_that_is_not_aligned():
    """The copy engine can't write over it where it lies."""
    p = Problem(CASES[9], "cuda", BF16)
    rest = (p.weights, *p.plan[:2], p.plan.tiles_2M, p.plan.block_m, "swiglu")
    expected = ops.d_activation(p.d_out, p.w_down, p.h, *rest)
    memory = torch.full((p.h.numel() + 16,), 7.0, device="cuda", dtype=BF16)
    h = memory[3:-13].view_as(p.h)
    h.copy_(p.h)
    apart = ops.d_activation(p.d_out, p.w_down, h, *rest)
    assert bitwise_equal(h, p.h), "h was written over"
    over = ops.d_activation_(p.d_out, p.w_down, h, *rest)
    for dh, a_scaled, d_s in (apart, (h, *over)):
        assert bitwise_equal(dh[: p.kept], expected[0][: p.kept])
        assert bitwise_equal(a_scaled[: p.kept], expected[1][: p.kept]) and bitwise_equal(d_s, expected[2])
    assert bitwise_equal(h[p.kept :], p.h[p.kept :]), "rows no expert owns were written"
    assert (memory[:3] == 7).all() and (memory[-13:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_weights_of_other_dtypes(dtype):
    p = Problem(CASES[5], "cuda", BF16)
    rest = (*p.plan[:2], p.plan.tiles_2M, p.plan.block_m, "swiglu")
    expected = ops.d_activation(p.d_out, p.w_down, p.h, p.weights, *rest)
    found = ops.d_activation(p.d_out, p.w_down, p.h, p.weights.to(dtype), *rest)
    for ours, same in zip(found[:2], expected[:2]):
        assert_close(ours[: p.kept], same[: p.kept].double(), same[: p.kept])


def test_rows_and_slices_that_are_not_aligned():
    """A copy is made where the copy engine can't read; a slice of 64 columns is read where it lies."""
    p = Problem(Case(200, 2, 3, 128, 136, block_m=128), "cuda", BF16)
    offsets, _, _, tiles, block_m = p.plan
    expected = ops.grouped_gemm(p.a, p.w_down, None, offsets, tiles, block_m, True)[: p.kept]
    wide = torch.full((p.a.shape[0], 200), torch.nan, device="cuda", dtype=BF16)
    for start in (3, 8):
        wide[:, start : start + 136] = p.a
        y = ops.grouped_gemm(wide[:, start : start + 136], p.w_down, None, offsets, tiles, block_m, True)
        assert bitwise_equal(y[: p.kept], expected)
    for columns in (slice(64, 128), slice(3, 67)):
        y = ops.grouped_gemm(p.a, p.w_down[:, columns], None, offsets, tiles, block_m, True)
        assert bitwise_equal(y[: p.kept], expected[:, columns].contiguous())


@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
def test_biases_and_weights_that_are_not_aligned(transposed):
    """A copy is made where they can't be read 16 bytes at a time; a bias that is expanded is made whole."""
    p = Problem(Case(200, 2, 3, 128, 136, "swiglu_oai", block_m=128, interleaved=True), "cuda", BF16)
    p.bias_gate_up = p.bias_gate_up[:1].expand_as(p.bias_gate_up)
    expected = products(p, How(bias=True))
    p.bias_gate_up = p.bias_gate_up.contiguous()
    for name in ("w_gate_up", "w_down", "bias_gate_up"):
        right = getattr(p, name)
        stored = right.mT if transposed and right.dim() == 3 else right
        wide = torch.full((*stored.shape[:-1], stored.shape[-1] + 11), torch.nan, device="cuda", dtype=BF16)
        wide[..., 3:-8] = stored
        setattr(p, name, wide[..., 3:-8].mT if stored is not right else wide[..., 3:-8])
        assert torch.equal(getattr(p, name), right)
    found = products(p, How(bias=True))
    for name in ("H", "A", "dH", "A'", "dS"):
        assert_close(found[name].to(BF16), expected[name].double(), expected[name].to(BF16), name)


TENSORS = ("x", "d_out", "w_gate_up", "w_down", "h", "a")


@pytest.mark.parametrize("stride", [0, 3, 2**40])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)  # T, R and E are 1; E is 1
def test_a_size_of_one_may_have_any_stride(case, stride):
    p = Problem(case, "cuda", BF16)
    expected = products(p)
    for name in TENSORS:
        tensor = getattr(p, name)
        strides = [stride if size == 1 else old for size, old in zip(tensor.shape, tensor.stride())]
        setattr(p, name, tensor.as_strided(tensor.shape, strides))
    for name, result in products(p).items():
        assert bitwise_equal(result, expected[name]), name


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=str)  # one expert, three
def test_permuted_weights(case):
    p = Problem(case, "cuda", BF16)
    expected = products(p)
    for name in ("w_gate_up", "w_down"):
        setattr(p, name, getattr(p, name).transpose(0, 1).contiguous().transpose(0, 1))
    for name, result in products(p).items():
        assert bitwise_equal(result, expected[name]), name


def test_expanded_tensors():
    """The same weights for every expert, and what sum().backward() hands back: their strides are 0."""
    p = Problem(CASES[5], "cuda", BF16)
    names = ("x", "d_out", "w_gate_up", "w_down")
    for name in names:
        setattr(p, name, getattr(p, name)[:1].expand_as(getattr(p, name)))
    found = products(p)
    for name in names:
        setattr(p, name, getattr(p, name).contiguous())
    for name, result in products(p).items():
        assert bitwise_equal(result, found[name]), name


def test_two_streams_at_once():
    """Each launch has a counter of its own."""
    p = Problem(CASES[12], "cuda", BF16)
    expected = products(p)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(products(p))
    torch.cuda.synchronize()
    for results in found:
        for name, result in results.items():
            assert bitwise_equal(result, expected[name]), name

"""Checks whose numbers are asked for in one go say what the single ones say."""

import pytest
import torch

from tests.tolerances import Together, assert_close, bitwise_equal

TRUTH = torch.linspace(-1, 1, 101, dtype=torch.float64)


def test_close_by_the_tables():
    assert_close(TRUTH.float(), TRUTH)
    assert_close(TRUTH.bfloat16(), TRUTH, TRUTH.bfloat16())
    assert_close(TRUTH[:0].float(), TRUTH[:0])
    assert_close(0 * TRUTH.float(), 0 * TRUTH)


@pytest.mark.parametrize(
    "actual,plain,message",
    [
        (TRUTH.float() * (1 + 1e-4), None, "x: relative L2 error 1.00e-04, allowed 1.00e-05"),
        (TRUTH.float()[1:], None, r"x: shape \[100\], expected \[101\]"),
        (TRUTH.bfloat16() * 1.01, TRUTH.bfloat16(), "x: relative L2 error"),
        (TRUTH.bfloat16(), TRUTH.bfloat16() * torch.nan, "allowed nan"),
        (TRUTH.float() * torch.nan, None, "x: relative L2 error nan"),
        (TRUTH.float() + 1, None, "x: relative L2 error"),
    ],
    ids=["off", "shape", "half-off", "plain-nan", "nan", "shifted"],
)
def test_not_close(actual, plain, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, TRUTH, plain, "x")


def test_one_wrong_element_of_many():
    truth = torch.ones(10**6, dtype=torch.float64)
    actual = truth.float()
    actual[7] += 5e-3
    with pytest.raises(AssertionError, match=r"x: one element is off by 5\.00e-03"):
        assert_close(actual, truth, None, "x")


def test_a_zero_truth_takes_no_other_number():
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_close(torch.full((3,), 1e-3), torch.zeros(3, dtype=torch.float64))


def test_bits():
    nan = torch.full((3,), torch.nan)
    other = (nan.view(torch.int32) + 1).view(torch.float32)
    assert bitwise_equal(nan, nan.clone()) and not bitwise_equal(nan, other)
    assert not bitwise_equal(nan, nan[:2]) and not bitwise_equal(nan, nan.double())


def test_the_first_check_that_fails_speaks():
    with pytest.raises(AssertionError, match="second"), Together() as checks:
        checks.same_bits(TRUTH, TRUTH.clone(), "first")
        checks.close(TRUTH * 2, TRUTH, None, "second")
        checks.true(torch.tensor(False), "third")


@pytest.mark.parametrize("other", [TRUTH + 1, TRUTH[1:], TRUTH.float()], ids=["values", "shape", "dtype"])
def test_other_bits(other):
    with pytest.raises(AssertionError, match="other bits"), Together() as checks:
        checks.same_bits(TRUTH, other, "other bits")


def test_an_error_in_the_block_is_the_one_raised():
    with pytest.raises(RuntimeError, match="broken"), Together() as checks:
        checks.true(torch.tensor(False), "never asked")
        raise RuntimeError("broken")


def test_nothing_to_ask():
    with Together():
        pass


def test_numbers_go_to_their_judges():
    found = []
    with Together() as checks:
        checks.ask(torch.tensor([1.0, 2.0], dtype=torch.float64), found.append)
        checks.true(torch.tensor(True), "")
        checks.ask(torch.tensor([3.0], dtype=torch.float64), found.append)
    assert found == [[1, 2], [3]]

"""Weights as integers."""

import numpy as np
import pytest
import torch

from cxt.model.quantization import round_to_integers


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_is_that_of_a_loop(bits, dtype):
    torch.manual_seed(1)
    weight = torch.randn(7, 11).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-20
    integers, scales = round_to_integers(weight, bits=bits)
    assert integers.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert scales.shape == (7, 1)
    largest = 2 ** (bits - 1) - 1
    for row, values in enumerate(weight.float().numpy()):
        scale = np.abs(values).max() / np.float32(largest) if values.any() else np.float32(1)
        assert scales[row, 0] == scale
        for column, value in enumerate(values):
            integer = int(np.rint(value / scale))
            assert integers[row, column] == integer
            assert abs(integer) <= largest
            assert abs(float(integer) * float(scale) - float(value)) <= float(scale) / 2 * (1 + 1e-6)


def test_rounding_twice_is_rounding_once():
    torch.manual_seed(2)
    integers, scales = round_to_integers(torch.randn(5, 9))
    again, same = round_to_integers(integers * scales)
    assert torch.equal(integers, again)
    assert torch.allclose(scales, same, rtol=1e-6)


def test_smallest_numbers():
    integers, scales = round_to_integers(torch.full((2, 3), 1e-45))
    assert integers.abs().max() <= 127
    assert (scales > 0).all()


@pytest.mark.parametrize(
    ("weight", "bits", "expected"),
    [
        (torch.ones(3), 8, "matrix of floats"),
        (torch.ones(3, 3, dtype=torch.int8), 8, "matrix of floats"),
        (torch.tensor([[1.0, torch.inf]]), 8, "not finite"),
        (torch.tensor([[1.0, torch.nan]]), 8, "not finite"),
        (torch.ones(3, 3), 1, "bits must be from 2 to 8"),
        (torch.ones(3, 3), 9, "bits must be from 2 to 8"),
    ],
    ids=["vector", "integers", "infinite", "nan", "one bit", "nine bits"],
)
def test_what_cannot_be_rounded(weight, bits, expected):
    with pytest.raises(ValueError, match=expected):
        round_to_integers(weight, bits=bits)

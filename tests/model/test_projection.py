"""Several projections of one input are one product."""

import pytest
import torch
from torch import nn

from model.projection import joined_product


@pytest.mark.parametrize("bias", [False, True])
def test_the_joined_product_is_the_projections_side_by_side(bias):
    torch.manual_seed(0)
    projections = [nn.Linear(6, features, bias=bias, dtype=torch.float64) for features in (4, 2, 3)]
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = torch.cat([projection(x) for projection in projections], -1)
    torch.testing.assert_close(joined_product(x, *projections), expected, rtol=0, atol=1e-14)

"""Direct attention against the oracle: dense softmax attention in float64."""

import pytest
import torch

from model.decoding.direct import Part, attend
from tests.kernels.oracle import RELATIVE_ERROR, dense_attention


def case(dtype: torch.dtype, queries: int = 3, size: float = 3.0):
    """q, k, v of 4 query heads on 2 KV heads, scores of some `size`; a mask that leaves the last query with nothing."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = size * draw(2, 4, queries, 8), draw(2, 2, 50, 8), draw(2, 2, 50, 8)
    mask = torch.rand(2, 2, queries, 50, generator=generator) < 0.5
    mask[:, :, -1] = False
    return q.to(dtype), k.to(dtype), v.to(dtype), mask


def parts(k, v, mask) -> list[Part]:
    return [Part(k[:, :, s], v[:, :, s], mask[..., s]) for s in (slice(0, 7), slice(7, 8), slice(8, 50))]


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
def test_equals_the_oracle_over_all_parts(dtype):
    q, k, v, mask = case(dtype)
    out, lse = attend(q, parts(k, v, mask), 0.4)
    expected, expected_lse = dense_attention(q, k, v, mask, 0.4)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.double() - expected).abs().max() <= RELATIVE_ERROR[dtype] * expected.abs().max()
    assert torch.equal(lse.isfinite(), expected_lse.isfinite()) and not lse[:, :, -1].isfinite().any()
    finite = expected_lse.isfinite()
    limit = (
        RELATIVE_ERROR[torch.float64 if dtype == torch.float64 else torch.float32] * expected_lse[finite].abs().max()
    )
    assert (lse.double() - expected_lse)[finite].abs().max() <= limit  # scores are summed in float32, always


def test_pieces_of_queries_and_masks_of_one_row_change_nothing(monkeypatch):
    q, k, v, mask = case(torch.float64, queries=11)
    same = torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = attend(q, [*parts(k, v, mask), Part(v, k, same)], 0.4)
    monkeypatch.setattr("model.decoding.direct.SCORES_AT_ONCE", 2 * 4 * 100 * 2)
    pieces = attend(q, [*parts(k, v, mask), Part(v, k, same)], 0.4)
    for got, wanted in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=0)

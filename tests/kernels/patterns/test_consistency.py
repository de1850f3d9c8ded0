"""The check of a pattern's methods accepts every pattern here, and names a visible pair that is left out."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from configs.build import ConfigError, build_plan
from configs.trust import trust
from kernels.patterns import Pattern, Strided, Window
from kernels.patterns.consistency import check_consistency
from tests.kernels.oracle import PATTERNS


@dataclass(frozen=True)
class Powers(Pattern):
    """A window, and the keys whose distance is a power of two. `reach` and `kept` are what a user may get wrong."""

    width: int = 64
    reach: int | None = None
    kept: int | None = None

    @property
    def horizon(self) -> int | None:
        return self.kept

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        distance = query - key_start
        return (distance < self.width) | (distance & (distance - 1) == 0)

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        reach = length if self.reach is None else self.reach
        return (query_start - reach)[..., None], query_stop[..., None]


@dataclass(frozen=True)
class Numbers(Powers):
    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        return (query - key_start) % 2


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("pattern", [*PATTERNS.values(), Strided(4, 4, 1), Window(1 << 20), Powers()])
def test_a_pattern_that_leaves_no_pair_out_is_accepted(pattern, block):
    check_consistency(pattern, block)


def test_a_pair_outside_the_candidates_is_named():
    with pytest.raises(ValueError, match=r"candidates: must cover .*, and leave out key \d+ of query \d+"):
        check_consistency(Powers(reach=64), 128)
    # Distances up to 16,384 are in the tiles of candidates that reach back so far, and the next one is not.
    check_consistency(Powers(reach=16_384), 128)
    with pytest.raises(ValueError, match="leave out"):
        check_consistency(Powers(reach=16_384 - 256), 128)


def test_a_pair_that_a_cache_would_drop_is_named():
    with pytest.raises(ValueError, match=r"^horizon=64: must reach every visible key that is not persistent, not so"):
        check_consistency(Powers(kept=64), 128)
    check_consistency(Powers(kept=1 << 15), 128)


def test_visible_that_returns_no_booleans_is_refused():
    with pytest.raises(ValueError, match=r"^visible: must return booleans, and returns int64$"):
        check_consistency(Numbers(), 128)


def test_a_config_with_such_a_pattern_is_refused_with_its_key():
    trust(f"{__name__}.Powers")
    attention = {"schedule": ["log"], "block": 128, "backend": "auto"}
    with pytest.raises(ConfigError, match=r"^attention\.patterns\.log\.candidates: must cover every visible key"):
        build_plan(attention | {"patterns": {"log": {"_target_": f"{__name__}.Powers", "reach": 64}}})


def test_the_check_runs_where_models_are_built_without_memory():
    with torch.device("meta"), pytest.raises(ValueError, match="candidates: must cover"):
        check_consistency(Powers(reach=64), 128)

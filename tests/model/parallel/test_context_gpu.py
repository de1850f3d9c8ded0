"""Two GPUs that share sequences, through NCCL and in bf16, against one GPU."""

import pytest
import torch

from model.parallel.ranges import contiguous, interleaved, take
from tests.model.parallel.gpu_workers import LENGTH, PATTERNS, run_models
from tests.model.parallel.ranks import run_on_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]


def joined(name: str, by_rank: list[dict[str, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Results of the whole sequence from those of its parts."""
    results = [each[name] for each in by_rank]
    if len(results) == 1:
        return results[0]
    order = interleaved if name in ("dense", "routed") else contiguous
    found = {key: sum(result[key] for result in results) for key in results[0] if key != "per_token"}
    per_token = torch.zeros(len(results[0]["per_token"]), LENGTH)
    for held, result in zip(order(LENGTH, len(results)), results, strict=True):
        at = take(torch.arange(LENGTH), held, 0)
        per_token[:, at] = result["per_token"].float()
    return found | {"per_token": per_token}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_gpus_are_as_near_to_float32_as_one(compiled):
    names = ["window", "routed"] if compiled else list(PATTERNS)  # to compile a family takes 15 s
    truth = [run_models(names, torch.float32)]
    alone = [run_models(names, torch.bfloat16)]
    together = run_on_ranks(run_models, 2, names, torch.bfloat16, compiled, backend="nccl")
    for name in names:
        exact, one, two = (joined(name, results) for results in (truth, alone, together))
        assert exact.keys() == two.keys()
        for key, value in exact.items():
            # The noise of a few numbers (a logit a head) differs as much from one rounding to another as from its
            # mean. A rank's share that is missing or counted twice is half of the value.
            least = 1e-3 if value.numel() >= 64 else 0.1
            noise = (one[key].double() - value).norm()
            error = (two[key].double() - value).norm()
            assert error <= 1.5 * noise + least * value.norm(), f"{name}: {key}: {error:.2e}, {noise:.2e}"

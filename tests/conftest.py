"""What every room's tests share."""

import contextvars
import dataclasses
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It wants to be asked for before anything imports triton,
# and many things do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings
from omegaconf import OmegaConf

import configs  # noqa: F401
from tests import compositions

compositions.remember()

# Every test process has one thread. Bitwise comparisons then do not depend on the number of free cores; and on a busy
# machine, threads that wait for one another are many times slower than one. Commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Tests train on the CPU, on a machine with a GPU too, unless they ask for it.
OmegaConf.register_new_resolver("on_gpu", lambda gpu, cpu: cpu, replace=True)

# The same examples on every machine and in every run: a failure is repeatable, and a slow machine is no failure.
settings.register_profile(
    "farsight",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("farsight")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--half", choices=("first", "second"), help="run one or the other half of each test's cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs slow tests first where several processes share the tests, and drops the other half of each test's cases.

    The half that is dropped is random, and the same in every process.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = _slow_first(items, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    if not (half := config.getoption("half")):
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    dropped = set()
    for name, group in cases.items():
        random.Random(name).shuffle(group)
        if len(group) > 1:
            dropped |= set(group[half == "first" :: 2])
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def _slow_first(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Returns the tests in an order in which each process begins with its share of the slow ones: xdist gives each an
    equal piece of the list. A slow test that begins last would run alone while the other processes wait."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = iter([item for item in items if not item.get_closest_marker("slow")])
    ordered: list[pytest.Item] = []
    for process in range(processes):
        size = (len(items) - len(ordered)) // (processes - process)
        share = slow[process::processes]
        ordered += [*share, *islice(others, max(0, size - len(share)))]
    return [*ordered, *others]


def pytest_collection_finish() -> None:
    """Makes Triton's interpreter faster.

    The interpreter prepares its language once for a kernel, and not for each function that a kernel calls. It computes
    integer sums and products a second time, in 64 bits, only with `debug`, which alone asserts that they are equal.
    """
    if (interpreter := sys.modules.get("triton.runtime.interpreter")) is None:
        return
    language, plain = interpreter.tl, interpreter._patch_lang

    def prepare(function: Callable) -> Any:
        if any(language.core.is_builtin(module.load) for module in (language, language.core)):
            return plain(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepare
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


@pytest.fixture(autouse=True)
def no_class_is_trusted() -> Iterator[None]:
    """A command trusts classes until its process ends (configs/trust.py); a test, until the next one begins."""
    for variable in contextvars.copy_context():
        if variable.name == "trusted":
            variable.set(frozenset())
    yield


@pytest.fixture
def fp8_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes products in fp8, which no config can choose."""
    monkeypatch.setattr("kernels.fp8.EMULATE", True)

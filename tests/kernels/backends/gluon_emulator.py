"""Runs Gluon kernels for Hopper on a CPU: their Python code as it stands, on a model of what it waits for.

The roles of `warp_specialize` run in turn, and a seeded choice at every wait says which goes on. What runs
asynchronously on a GPU happens as late as its waits allow: copies by TMA at a random later moment, matrix products when
they are awaited. A buffer holds NaN from the moment in which a copy into it is asked for. So a missing wait, a buffer
that is released early, a wrong phase or a wrong count of bytes gives wrong results or `Deadlock`. Pointers are
checked. Layouts, fences, registers and the order of instructions are not modelled.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon import language
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction


class Deadlock(AssertionError):
    """Every role waits, and no copy is under way."""


class Scheduler:
    """The roles of one program, of which one runs at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[tuple[int, Callable[[], None]]] = []
        """Pending TMA copies: (the role that issued a store, or -1 for a load; a function that performs the copy)."""
        self.products: dict[int, list[Product]] = {}
        self.failure: BaseException | None = None
        self._turn = threading.Condition()
        self._current = -1
        self._waiting: set[int] = set()
        self._live: set[int] = set()

    def run(self, roles: Sequence[Callable[[], None]]) -> None:
        self._live = set(range(len(roles)))
        self.products = {role: [] for role in self._live}
        threads = [threading.Thread(target=self._run, args=item, daemon=True) for item in enumerate(roles)]
        for thread in threads:
            thread.start()
        with self._turn:
            self._next()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        assert not self.copies, "the program ended before its copies"
        assert not any(self.products.values()), "a role ended before its products"

    @property
    def role(self) -> int:
        return self._current

    def changed(self) -> None:
        """A barrier or a copy has made progress: whoever waits looks again."""
        self._waiting.clear()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Lets others run, at least once, until `ready`."""
        if not self._live:  # before the roles start
            return
        me = self._current
        with self._turn:
            while True:
                for copy in list(self.copies):
                    if self.random.random() < (0.3 if copy[0] < 0 else 0.02):  # stores are late, as a rule
                        self._copy(copy)
                go_on = ready()
                if not go_on:
                    self._waiting.add(me)
                    if self._waiting == self._live:
                        if not self.copies:
                            raise Deadlock(f"roles {sorted(self._live)} all wait")
                        self._copy(self.random.choice(self.copies))
                self._next()
                while self._current != me:
                    self._turn.wait()
                    if self.failure:
                        raise SystemExit
                if go_on:
                    return

    def _copy(self, copy: tuple[int, Callable[[], None]]) -> None:
        self.copies.remove(copy)
        copy[1]()
        self.changed()

    def _next(self) -> None:
        candidates = sorted(self._live - self._waiting) or sorted(self._live)
        self._current = self.random.choice(candidates) if candidates else -1
        self._turn.notify_all()

    def _run(self, me: int, role: Callable[[], None]) -> None:
        try:
            with self._turn:
                while self._current != me:
                    self._turn.wait()
                    if self.failure:
                        return
            role()
        except SystemExit:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            with self._turn:
                self._live.discard(me)
                self._next()


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are there."""

    def __init__(self, scheduler: Scheduler, arrivals: int) -> None:
        self.scheduler, self.arrivals, self.missing, self.bytes, self.phase = scheduler, arrivals, arrivals, 0, 0

    def add(self, arrivals: int, expected: int) -> None:
        self.missing -= arrivals
        self.bytes += expected
        assert self.missing >= 0, "more arrivals than a phase has"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.arrivals
        self.scheduler.changed()

    def arrive(self, count: int) -> None:
        self.add(count, 0)
        self.scheduler.wait(lambda: True)  # others may go on first

    def wait(self, parity: int) -> None:
        self.scheduler.wait(lambda: self.phase % 2 != parity)


class Memory:
    """A view of shared memory."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def index(self, i: Any) -> "Memory":
        return Memory(self.values[int(i)])

    def reshape(self, shape: Sequence[int]) -> "Memory":
        return Memory(self.values.view(shape))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> "Memory":
        assert dtype == self.values.dtype
        return self.reshape(shape)

    def permute(self, order: Sequence[int]) -> "Memory":
        return Memory(self.values.permute(*order))

    def load(self, layout: Any) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        assert values.dtype == self.values.dtype
        self.values.copy_(values)


class Product:
    """A matrix product that is computed when it is awaited."""

    def __init__(self, left: Any, right: Memory, sums: Any, use_sums: bool) -> None:
        self.left, self.right, self.sums, self.use_sums, self.value = left, right, sums, use_sums, None

    def compute(self) -> None:
        left = self.left.values if isinstance(self.left, Memory) else self.left
        assert left.dtype == self.right.values.dtype
        self.value = left.float() @ self.right.values.float()
        if self.use_sums:
            self.value = self.value + (self.sums.value if isinstance(self.sums, Product) else self.sums)


class Pointer:
    """An address in a tensor, or a tensor of addresses."""

    def __init__(self, values: Tensor, offset: Any = 0) -> None:
        self.values, self.offset = values, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.values, self.offset + offset)

    def at(self, mask: Any) -> tuple[Tensor, Tensor]:
        """(int64 offsets, booleans of the same shape)."""
        offset = torch.as_tensor(self.offset).long()
        mask = torch.as_tensor(True if mask is None else mask).expand(offset.shape)
        inside = (offset >= 0) & (offset < self.values.numel())
        assert bool((inside | ~mask).all()), "an address beyond the tensor"
        return torch.where(mask, offset, 0), mask


class Descriptor:
    """A TensorDescriptor: copies of blocks, zeros beyond the tensor's end."""

    def __init__(self, of: TensorDescriptor) -> None:
        self.tensor = torch.as_strided(of.base, of.shape, of.strides)
        self.block, self.layout, self.dtype = tuple(of.block_shape), of.layout, of.base.dtype

    def views(self, corner: Sequence[Any], block: Tensor) -> tuple[Tensor, Tensor]:
        """What the tensor and a block at `corner` share."""
        begin = [int(c) for c in corner]
        sizes = [max(0, min(n, size - b)) for b, n, size in zip(begin, self.block, self.tensor.shape, strict=True)]
        of_tensor = tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True))
        return self.tensor[of_tensor], block.view(self.block)[tuple(slice(0, n) for n in sizes)]


class Launch:
    """A kernel whose programs run one after the other."""

    def __init__(self, function: Callable, seed: int, state: SimpleNamespace) -> None:
        self.function, self.seed, self.state = function, seed, state

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            given = [_device_argument(a) for a in arguments]
            for program in range(grid[0]):
                self.state.scheduler = Scheduler(self.seed + program)
                self.state.program, self.state.programs = program, grid[0]
                self.function(*given, **constants)

        return launch


def _device_argument(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    return Pointer(value.view(-1)) if isinstance(value, Tensor) else value


def _language(state: SimpleNamespace) -> SimpleNamespace:
    """What kernels use of `triton.experimental.gluon.language`; layouts are None."""

    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
        offset, mask = pointer.at(mask)
        filler = torch.as_tensor(other, dtype=pointer.values.dtype)
        return torch.where(mask, pointer.values[offset] if pointer.values.numel() else filler, filler)

    def store(pointer: Pointer, values: Tensor, mask: Any = None) -> None:
        offset, mask = pointer.at(mask)
        values = torch.as_tensor(values, dtype=pointer.values.dtype).expand(offset.shape)
        pointer.values[offset[mask]] = values[mask]

    def where(condition: Any, yes: Any, no: Any) -> Any:
        if all(torch.as_tensor(each).dim() == 0 for each in (condition, yes, no)):
            return yes if condition else no
        return torch.where(torch.as_tensor(condition), yes, no)

    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
        return Memory(torch.full(shape, torch.nan, dtype=dtype))

    def warp_specialize(roles: Sequence[tuple[Callable, tuple]], *_: Any) -> None:
        state.scheduler.run([lambda f=function, a=arguments: f(*a) for function, arguments in roles])

    scalars = lambda choose: lambda a, b: choose(int(a), int(b))  # noqa: E731
    nothing = lambda *_, **__: None  # noqa: E731
    return SimpleNamespace(
        **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int64", "exp2", "log2")},
        load=load,
        store=store,
        where=where,
        minimum=scalars(min),
        maximum=lambda a, b: torch.maximum(a, b) if isinstance(a, Tensor) and a.dim() else scalars(max)(a, b),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        arange=lambda begin, end, layout: torch.arange(begin, end, dtype=torch.int32),
        reshape=lambda x, shape: x.reshape(shape),
        expand_dims=lambda x, axis: x.unsqueeze(axis),
        convert_layout=lambda x, layout, **_: x,
        static_range=range,
        program_id=lambda axis: state.program,
        num_programs=lambda axis: state.programs,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
        SliceLayout=nothing,
        DotOperandLayout=nothing,
        SwizzledSharedLayout=nothing,
        NVMMASharedLayout=language.NVMMASharedLayout,
        constexpr=language.constexpr,
    )


def _hopper(state: SimpleNamespace) -> dict[str, Any]:
    """What kernels use of `gluon.language.nvidia.hopper` and of kernels/backends/hopper/common.py."""

    def barriers(count: int, arrivals: int) -> SimpleNamespace:
        made = [Barrier(state.scheduler, arrivals) for _ in range(count)]
        return SimpleNamespace(index=lambda i: made[int(i)])

    def read(descriptor: Descriptor, corner: Sequence[Any], barrier: Barrier, memory: Memory) -> None:
        memory.values.fill_(torch.nan)

        def copy() -> None:
            memory.values.zero_()
            of_tensor, of_block = descriptor.views(corner, memory.values)
            of_block.copy_(of_tensor)
            barrier.add(0, -memory.values.numel() * memory.values.element_size())

        state.scheduler.copies.append((-1, copy))

    def write(descriptor: Descriptor, corner: Sequence[Any], memory: Memory) -> None:
        def copy() -> None:
            of_tensor, of_block = descriptor.views(corner, memory.values)
            of_tensor.copy_(of_block)

        state.scheduler.copies.append((state.scheduler.role, copy))

    def store_wait(pending: int) -> None:
        me = state.scheduler.role
        state.scheduler.wait(lambda: all(role != me for role, _ in state.scheduler.copies))

    def multiply(left, right, sums, use_acc=True, is_async=False) -> Product:
        product = Product(left, right, sums, use_acc)
        state.scheduler.products[state.scheduler.role].append(product)
        return product

    def multiply_wait(pending: int, deps: Sequence[Product]) -> Any:
        queue = state.scheduler.products[state.scheduler.role]
        while len(queue) > pending:
            queue.pop(0).compute()
        values = [each.value for each in deps]
        assert all(value is not None for value in values), "a product is used before it is awaited"
        return values[0] if len(values) == 1 else values

    return {
        "mbarrier": SimpleNamespace(
            wait=lambda barrier, phase, pred=True: barrier.wait(int(phase)) if pred else None,
            arrive=lambda barrier, count=1, pred=True: barrier.arrive(count) if pred else None,
            expect=lambda barrier, expected: barrier.add(1, expected),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=read, async_copy_shared_to_global=write, store_wait=store_wait
        ),
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": multiply_wait,
        "barriers": barriers,
        "fence_async_shared": lambda: None,
        "synchronize": lambda: None,
        "pack_pairs": lambda x, columns, dtype: x.to(dtype),
        "unpack_pairs": lambda x, columns, layout, dtype: x,
    }


@contextmanager
def emulated(*modules: ModuleType, kernels: Sequence[str], programs: int, seed: int = 0) -> Iterator[None]:
    """Replaces Gluon in the modules of some kernels; `kernels` are the names of those that are launched, each with at
    most `programs` programs."""
    state = SimpleNamespace(scheduler=None, program=0, programs=1)
    replaced = {"gl": _language(state), "processors": lambda device: programs, **_hopper(state)}
    with ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if name in replaced:
                    value = replaced[name]
                elif isinstance(value, GluonJITFunction):
                    value = Launch(value.fn, seed, state) if name in kernels else value.fn
                elif isinstance(value, language.constexpr):
                    value = value.value
                elif isinstance(value, ConstexprFunction):
                    value = lambda *_: None  # noqa: E731 - a layout
                else:
                    continue
                stack.enter_context(mock.patch.object(module, name, value))
        yield

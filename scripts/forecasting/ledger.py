"""Who holds how many bytes, and when it was most: a ledger of tensors' storages while they are only rehearsed.

Under PyTorch's FakeTensorMode every operator runs on shapes alone: nothing is computed, and nothing allocated. The
ledger sees each operator, books the storages of its results under the label that is in force, and strikes them out when
the last tensor lets go of them. So what autograd saves, what checkpointing drops and recomputes, and what autocast
copies is counted from the model's own code, and not from a formula beside it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKSPACE = "workspace of kernels"

HEAP_BLOCK = 32 << 20
"""From this size on a tensor on the CPU has a mapping of its own, and smaller ones share C's heap: glibc raises its
threshold as larger blocks are freed, up to here."""

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)

Workspace = Callable[[torch._ops.OpOverload, tuple], int]
"""(operator, its arguments) -> bytes that it holds while it runs, besides its results: opaque operators show none."""


class Ledger(TorchDispatchMode):
    """Enter it inside a FakeTensorMode.

    granularity: bytes to which an allocator rounds. workspace: of operators that allocate behind the dispatcher.
    """

    def __init__(self, granularity: int, workspace: Workspace) -> None:
        super().__init__()
        self.granularity, self.workspace = granularity, workspace
        self.label = ""
        self.phase = ""
        self.fused = False
        self.held: Counter[str] = Counter()
        self.total = 0
        self.most: dict[str, int] = {}
        """Of each phase, the bytes at its peak."""
        self.at_peak: dict[str, dict[str, int]] = {}
        """Of each phase, what they were, by label."""
        self.in_heap: Counter[str] = Counter()
        """Of `held`, what is smaller than HEAP_BLOCK."""
        self.most_in_heap: Counter[str] = Counter()
        """The most that `in_heap` was at any time, each label for itself."""
        self.entries: dict[int, list] = {}  # id of a storage -> [label, bytes, the weak reference that watches it]
        self.copies_of: dict[int, str] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is born inside is booked under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Books a tensor's storage under another label."""
        entry = self.entries.get(id(tensor.untyped_storage()))
        if entry is not None:
            self._hold(entry[0], -entry[1])
            self._hold(label, entry[1])
            entry[0] = label

    def label_copies(self, tensor: Tensor, label: str) -> None:
        """Copies of `tensor` in another dtype (autocast's) are booked under `label`."""
        self.copies_of[id(tensor.untyped_storage())] = label

    def book(self, tensor: Tensor) -> None:
        """Books a tensor that no operator made."""
        self._book(tensor.untyped_storage(), self.label)

    @contextmanager
    def fused_kernels(self) -> Iterator[None]:
        """Inside, only what matrix products read and write is booked: all else stays within fused kernels."""
        before, self.fused = self.fused, True
        try:
            yield
        finally:
            self.fused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        label = self.label
        if self.fused:
            if func in PRODUCTS:
                for leaf in (*tree_leaves(args), result):
                    if isinstance(leaf, Tensor):
                        self._book(leaf.untyped_storage(), label)
                self._look(0)
            return result
        if func is torch.ops.aten._to_copy.default:
            label = self.copies_of.get(id(args[0].untyped_storage()), label)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._book(leaf.untyped_storage(), label)
        extra = self.workspace(func, args) if func.namespace == "farsight" else 0
        self._look(extra)
        return result

    def _book(self, storage: torch.UntypedStorage, label: str) -> None:
        key = id(storage)
        if key in self.entries:
            return
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        self.entries[key] = [label, size, weakref.ref(storage, lambda _: self._strike(key))]
        self._hold(label, size)

    def _strike(self, key: int) -> None:
        label, size, _ = self.entries.pop(key)
        self._hold(label, -size)

    def _hold(self, label: str, size: int) -> None:
        self.held[label] += size
        self.total += size
        if abs(size) < HEAP_BLOCK:
            self.in_heap[label] += size
            self.most_in_heap[label] = max(self.most_in_heap[label], self.in_heap[label])

    def _look(self, extra: int) -> None:
        if self.total + extra > self.most.get(self.phase, 0):
            self.most[self.phase] = self.total + extra
            held = {label: size for label, size in self.held.items() if size}
            self.at_peak[self.phase] = held | ({WORKSPACE: extra} if extra else {})

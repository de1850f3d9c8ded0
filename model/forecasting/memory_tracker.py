"""Tracks the bytes that tensors hold while operators run on fake tensors.

Under PyTorch's FakeTensorMode every operator runs on shapes alone: nothing is computed and nothing is allocated. The
tracker intercepts each operator, adds the storages of its results under the current label, and removes a storage when
its last tensor is freed. So the activations that autograd saves, that checkpointing drops and recomputes, and that
autocast copies are counted from the model's own code, not from a formula.
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
"""CPU tensors of at least this many bytes get their own memory mapping; smaller ones share C's heap. (glibc raises its
threshold as larger blocks are freed, up to this value.)"""

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten._scaled_mm.default)

Workspace = Callable[[torch._ops.OpOverload, tuple], int]
"""(operator, its arguments) -> bytes that the operator allocates while it runs, besides its results."""


class MemoryTracker(TorchDispatchMode):
    """A dispatch mode to enter inside a FakeTensorMode.

    granularity: bytes to which the allocator rounds
    workspace: bytes that our own operators allocate internally, where no dispatch mode sees them

    held: bytes that are held now, by label, and `total`, their sum
    peak, peak_by_label: by phase, the most bytes held at once, and their labels
    heap, heap_peak: by label, the bytes of `held` in tensors smaller than HEAP_BLOCK, and their maximum
    """

    def __init__(self, granularity: int, workspace: Workspace) -> None:
        super().__init__()
        self.granularity, self.workspace = granularity, workspace
        self.label = ""
        self.phase = ""
        self.in_fused_kernel = False
        self.held: Counter[str] = Counter()
        self.total = 0
        self.peak: dict[str, int] = {}
        self.peak_by_label: dict[str, dict[str, int]] = {}
        self.heap: Counter[str] = Counter()
        self.heap_peak: Counter[str] = Counter()
        self._storages: dict[int, list] = {}  # id of a storage -> [label, bytes, weak reference that removes it]
        self._copy_labels: dict[int, str] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages that are created inside are counted under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Moves a tensor's storage to another label."""
        entry = self._storages.get(id(tensor.untyped_storage()))
        if entry is not None:
            self._add(entry[0], -entry[1])
            self._add(label, entry[1])
            entry[0] = label

    def label_copies(self, tensor: Tensor, label: str) -> None:
        """Counts copies of `tensor` in another dtype (autocast's) under `label`."""
        self._copy_labels[id(tensor.untyped_storage())] = label

    def track(self, tensor: Tensor) -> None:
        """Counts a tensor that no operator has created."""
        self._track(tensor.untyped_storage(), self.label)

    @contextmanager
    def fused_kernels(self) -> Iterator[None]:
        """Inside, only operands and results of matrix products and of our own operators are counted: other tensors stay
        within fused kernels."""
        before, self.in_fused_kernel = self.in_fused_kernel, True
        try:
            yield
        finally:
            self.in_fused_kernel = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        label = self.label
        if self.in_fused_kernel:
            if func in PRODUCTS or func.namespace == "farsight":
                for leaf in tree_leaves((args, result)):
                    if isinstance(leaf, Tensor):
                        self._track(leaf.untyped_storage(), label)
                self._update_peak(self._workspace(func, args))
            return result
        if func is torch.ops.aten._to_copy.default:
            label = self._copy_labels.get(id(args[0].untyped_storage()), label)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage(), label)
        self._update_peak(self._workspace(func, args))
        return result

    def _workspace(self, func: Any, args: tuple) -> int:
        return self.workspace(func, args) if func.namespace == "farsight" else 0

    def _track(self, storage: torch.UntypedStorage, label: str) -> None:
        key = id(storage)
        if key in self._storages:
            return
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        self._storages[key] = [label, size, weakref.ref(storage, lambda _: self._remove(key))]
        self._add(label, size)

    def _remove(self, key: int) -> None:
        label, size, _ = self._storages.pop(key)
        self._add(label, -size)

    def _add(self, label: str, size: int) -> None:
        self.held[label] += size
        self.total += size
        if abs(size) < HEAP_BLOCK:
            self.heap[label] += size
            self.heap_peak[label] = max(self.heap_peak[label], self.heap[label])

    def _update_peak(self, workspace: int) -> None:
        if self.total + workspace > self.peak.get(self.phase, 0):
            self.peak[self.phase] = self.total + workspace
            held = {label: size for label, size in self.held.items() if size}
            self.peak_by_label[self.phase] = held | ({WORKSPACE: workspace} if workspace else {})

"""A least-recently-used cache."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Keeps the `size` most recently used values, so that a sweep over lengths does not keep them all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: OrderedDict[Hashable, Value] = OrderedDict()
        _caches.add(self)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self.values:
            self.values[key] = make()
            if len(self.values) > self.size:
                self.values.popitem(last=False)
        self.values.move_to_end(key)
        return self.values[key]


_caches: WeakSet[LRUCache] = WeakSet()


def cached_values() -> list[Any]:
    """The values that all caches hold now."""
    return [value for cache in _caches for value in cache.values.values()]


def forget_all_but(kept: Sequence[Any]) -> None:
    """Removes from all caches the values that are not among `kept`."""
    known = {id(value) for value in kept}
    for cache in _caches:
        for key in [key for key, value in cache.values.items() if id(value) not in known]:
            del cache.values[key]

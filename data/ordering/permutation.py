"""Permutations of 0, 1, ..., size - 1, each determined by a key: a seed and further integers.

A permutation of at most `EXPLICIT` numbers is an array that numpy shuffles. The elements of a larger one are computed
when they are read, in constant memory: a pass of 10**9 samples needs no array.
"""

from math import isqrt

import numpy as np

EXPLICIT = 2**20
"""The size of the largest permutation that is an array. Runs of earlier versions, whose permutations were all arrays,
resume exactly up to this size."""

ROUNDS = 8
MASK = 2**64 - 1


def permutation(size: int, *key: int) -> "np.ndarray | LazyPermutation":
    """Returns the permutation of `size` numbers that `key` determines; index it with an integer."""
    if size > EXPLICIT:
        return LazyPermutation(size, *key)
    return np.random.default_rng(key).permutation(size)


class LazyPermutation:
    """A permutation whose elements are computed one at a time, by a Feistel network.

    A number below rows x columns is a pair (row, column). Each round adds a hash of one of the two to the other, which
    can be undone, so no two numbers have the same image. The product of rows and columns is at least `size`; an image
    of `size` or more is mapped again until it is below `size` (cycle walking), which happens to at most one image in
    `columns`. Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
    """

    def __init__(self, size: int, *key: int):
        self.size = size
        self.columns = isqrt(size - 1) + 1
        self.rows = -(-size // self.columns)
        self.keys = [int(each) for each in np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        index = self._image(int(index))
        while index >= self.size:
            index = self._image(index)
        return index

    def _image(self, number: int) -> int:
        row, column = divmod(number, self.columns)
        for of_row, of_column in zip(self.keys[::2], self.keys[1::2], strict=True):
            row = (row + _hash(column ^ of_row)) % self.rows
            column = (column + _hash(row ^ of_column)) % self.columns
        return row * self.columns + column


def _hash(number: int) -> int:
    """Returns the 64 bits to which SplitMix64 mixes 64 bits. Source: Steele, Lea and Flood, "Fast Splittable
    Pseudorandom Number Generators", 2014."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)

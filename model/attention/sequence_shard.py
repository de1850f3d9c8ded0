"""The base class of the families' shards: attention of one rank's tokens, where several ranks share a sequence."""

from collections.abc import Sequence

from torch import Tensor

from kernels import Axis
from kernels.layout.cost import AttentionCost
from kernels.patterns import Pattern
from model.attention.base import AttentionCore, AttentionOutput, Inputs
from model.parallel.context import Context


class SequenceShard:
    """What a layer's attention needs of a batch whose sequences several ranks share. In a forward pass it takes the
    place of the layer's layout: the inputs hold the tokens of this rank, and `attend` brings the keys that they see.

    pattern: that of the layer, or one for each KV head. tokens: all tokens of the sequences. block, fixed: as in
    build_layout.
    """

    can_interleave = True
    """Whether a rank's tokens may be several ranges of a sequence."""

    def __init__(
        self, pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool, context: Context
    ) -> None:
        self.context, self.batch = context, tokens.batch
        self.queries = sum(map(len, context.own))

    @classmethod
    def unit(cls, pattern: Pattern | Sequence[Pattern], block: int, length: int) -> int:
        """Tokens of which each range of a rank must be a multiple, in sequences of `length`."""
        return block

    @property
    def overflow(self) -> Tensor | None:
        """As BlockLayout.overflow, for all layouts of the shard."""
        raise NotImplementedError

    def attend(self, inputs: Inputs, core: AttentionCore) -> AttentionOutput:
        """As AttentionCore.forward, for this rank's tokens; all ranks call it together. `core`: that of the layer."""
        raise NotImplementedError

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        """As BlockLayout.cost, for this rank's queries; densities are relative to causal attention over the tokens."""
        raise NotImplementedError

    def bytes_sent(self, core: AttentionCore, key_bytes: int) -> tuple[int, int]:
        """Returns the bytes that this rank sends to others in one layer, for one sequence, as (forward pass, backward
        pass). `key_bytes`: bytes of one element of a key or value."""
        raise NotImplementedError

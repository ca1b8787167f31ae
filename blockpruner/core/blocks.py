"""Blocks, masks and cuts: what can be removed from a decoder, and its text form.

A decoder layer is two residual blocks, `X' = X + MHA(norm(X))` and `Y = X' + MLP(norm(X'))`
(BlockPruner, arXiv 2406.10594, section 3.1). Removing one drops its whole residual branch, norm
included. This file decides names and order; which modules a block is made of is in `families`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from blockpruner.core.errors import InputError


class BlockKind(StrEnum):
    MHA = "mha"
    MLP = "mlp"


@dataclass(frozen=True)
class BlockId:
    """One residual block; text form "mha.25"."""

    kind: BlockKind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @property
    def order(self) -> tuple[int, int]:
        """Tie-break order of the paper's code: all MHA by layer, then all MLP by layer."""
        return (0 if self.kind is BlockKind.MHA else 1, self.layer)


Mask = frozenset[BlockId]
"""Removed blocks. The empty mask is the dense model."""

DENSE: Mask = frozenset()

Channels = tuple[int, ...]
"""The channels that a narrowed MLP keeps, by rising number: rows of what reads, and columns of what
writes."""


@dataclass(frozen=True)
class Cut:
    """All that a pruned model does without."""

    mask: Mask = DENSE
    channels: Mapping[BlockId, Channels] = field(default_factory=dict)
    """What narrowed MLPs keep; every other block that is left is whole."""


def format_channels(channels: Iterable[int], width: int) -> str:
    """Hexadecimal digits whose bits are the `width` channels of an MLP; the last bit is channel
    0."""
    bits = sum(1 << channel for channel in channels)
    digits = math.ceil(width / 4)
    return f"{bits:0{digits}x}"


def parse_channels(text: str) -> Channels:
    """Read what `format_channels` writes; raises ValueError for anything else."""
    bits = f"{int(text, 16):b}"
    return tuple(channel for channel, bit in enumerate(reversed(bits)) if bit == "1")


def parse_block(text: str) -> BlockId:
    """Read "mha.25"; raises InputError for anything else."""
    kind, _, layer = text.partition(".")
    if kind not in set(BlockKind) or not layer.isdecimal():
        raise InputError(
            f"block {text!r} is not of the form mha.<layer> or mlp.<layer>, for instance mha.25"
        )
    return BlockId(BlockKind(kind), int(layer))


def sorted_blocks(mask: Iterable[BlockId]) -> list[BlockId]:
    return sorted(mask, key=lambda block: block.order)


def format_mask(mask: Iterable[BlockId]) -> str:
    """Canonical text of a mask, "mha.3,mlp.1"; "" is the dense model."""
    return ",".join(str(block) for block in sorted_blocks(mask))


def parse_mask(text: str) -> Mask:
    names = [name for name in text.split(",") if name]
    return frozenset(parse_block(name) for name in names)


def all_blocks(layers: int) -> list[BlockId]:
    """The 2 x layers blocks of a decoder, in tie-break order."""
    return [BlockId(kind, layer) for kind in BlockKind for layer in range(layers)]


def pack_layers(mask: Mask, layers: int) -> list[tuple[int | None, int | None]]:
    """The remaining blocks of a mask, in as few layers as their order allows: for each new layer,
    the layer that its MHA and the layer that its MLP comes from; None: it has none. An MHA may
    share a layer with the MLP of a later one if everything between them is removed."""
    packed: list[tuple[int | None, int | None]] = []
    for layer in range(layers):
        if BlockId(BlockKind.MHA, layer) not in mask:
            packed.append((layer, None))
        if BlockId(BlockKind.MLP, layer) in mask:
            continue
        if packed and packed[-1][1] is None:
            # The newest layer has no MLP yet, so this one can follow its MHA.
            mha, _ = packed.pop()
            packed.append((mha, layer))
        else:
            packed.append((None, layer))
    return packed


def removable_units(layers: int, unit: str, candidates: str) -> list[Mask]:
    """What a search may remove at once, in tie-break order.

    Args:
        unit: "block" (BlockPruner), "layer" (both blocks of a layer, as SLEB and ShortGPT do), or
            "shifted" (an MLP and the MHA behind it, of the next layer).
        candidates: "all", "mha" or "mlp"; a pair holds both, so other units than "block" take only
            "all".
    """
    mha = [BlockId(BlockKind.MHA, layer) for layer in range(layers)]
    mlp = [BlockId(BlockKind.MLP, layer) for layer in range(layers)]
    if unit == "layer":
        return [frozenset(pair) for pair in zip(mha, mlp, strict=True)]
    if unit == "shifted":
        return [frozenset(pair) for pair in zip(mlp[:-1], mha[1:], strict=True)]
    blocks = {"all": mha + mlp, "mha": mha, "mlp": mlp}[candidates]
    return [frozenset({block}) for block in blocks]

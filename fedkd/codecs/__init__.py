"""Codecs: numbers made small enough to travel, and back again.

`quantise` puts probability vectors on a grid, `symbols` writes grid points as small numbers, if need be as changes
since an earlier round, and `entropy` turns those into as few bytes as their statistics allow. All but the first lose
nothing.
"""

from fedkd.codecs.quantise import MAX_BITS, from_symbols, quantise, symbols

__all__ = ["MAX_BITS", "from_symbols", "quantise", "symbols"]

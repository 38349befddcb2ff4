"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def align(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells as a table with aligned columns.

    Example:
        >>> print(align([("layer", "F"), ("conv", "144")]))
        layer  F
        conv   144
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

"""Shares and means with their uncertainty, and tables that read as text and as markdown."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

NORMAL_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share of pictures, the half-width of its 95 % interval, and how many pictures it stands on."""

    share: float | None
    """None when there are no pictures."""
    half_width: float
    total: int

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Self:
        """The share that is true, with the binomial half-width 1.96 sqrt(p (1 - p) / n)."""
        if not flags:
            return cls(share=None, half_width=0.0, total=0)
        share = sum(flags) / len(flags)
        return cls(share=share, half_width=NORMAL_95 * math.sqrt(share * (1 - share) / len(flags)), total=len(flags))

    @classmethod
    def of_values(cls, values: Sequence[float]) -> Self:
        """The mean of one figure per picture, with the half-width 1.96 s / sqrt(n), s their standard deviation."""
        if not values:
            return cls(share=None, half_width=0.0, total=0)
        deviation = statistics.pstdev(values)
        return cls(
            share=statistics.fmean(values), half_width=NORMAL_95 * deviation / math.sqrt(len(values)), total=len(values)
        )

    @classmethod
    def mean_of(cls, scores: Sequence["Score"]) -> Self:
        """The unweighted mean of independent scores; those without pictures are left out."""
        known = [(score.share, score.half_width, score.total) for score in scores if score.share is not None]
        if not known:
            return cls(share=None, half_width=0.0, total=0)
        shares, widths, totals = zip(*known, strict=True)
        return cls(share=statistics.fmean(shares), half_width=math.hypot(*widths) / len(known), total=sum(totals))

    def __str__(self) -> str:
        return "-" if self.share is None else f"{self.share:.2f}"

    @property
    def with_width(self) -> str:
        """Share and half-width as text."""
        return str(self) if self.share is None else f"{self} ± {self.half_width:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, rounded to six places."""
        share = None if self.share is None else round(self.share, 6)
        return {"share": share, "half_width": round(self.half_width, 6), "pictures": self.total}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns are aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = [("-" * (w - 1) + ":") if i else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])

"""Samples of a data set that turn out broken: each is told once and not read again, and too many stop the run.

What is remembered changes nothing but the time it takes: a sample that is known to be broken would break again.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from sana.data.examine import check_share
from sana.data.samples import BadSample, Dataset, Finding

T = TypeVar("T")
_log = logging.getLogger(__name__)


class BrokenSamples:
    """What is broken in one source."""

    def __init__(self, source: Dataset, where: str, controls: str = "") -> None:
        """Begin with what was seen amiss when the source was opened.

        `where` names it in messages, `controls` its control pictures.
        """
        self._where, self._controls, self._total = where, controls, 0
        self._findings: dict[Finding, None] = {}
        self._numbers: set[int] = set()
        for finding in source.findings:
            if finding.is_broken:
                self.note(finding)

    @property
    def findings(self) -> Sequence[Finding]:
        """What is wrong with them."""
        return tuple(self._findings)

    def counted(self, usable: int) -> None:
        """Say that all samples were looked at and how many are left; those that follow are judged one by one.

        Errors: BadData when too many are broken.
        """
        self._total = usable + sum(finding.samples for finding in self._findings)
        self._judge()

    def note(self, finding: Finding) -> None:
        """Tell what is wrong with a sample, once. Errors: BadData when too many are broken, after `counted`."""
        if finding in self._findings:
            return
        self._findings[finding] = None
        _log.warning("left out: %s", finding)
        if self._total:
            self._judge()

    def read(self, index: int, read: Callable[[int], T]) -> T | None:
        """Return what `read` makes of a sample, or None where it is broken. Errors: as `note`."""
        if index in self._numbers:
            return None
        try:
            return read(index)
        except BadSample as error:
            self._numbers.add(index)
            self.note(error.finding)
            return None

    def _judge(self) -> None:
        check_share(self.findings, self._total, where=self._where, controls=self._controls)

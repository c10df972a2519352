"""The check of a look, as the trainer hands it to objectives."""

from sana.training.objectives.base import LookLeft


class Checks:
    """Counts its calls and asks to leave at one of them."""

    def __init__(self, leave_at: int) -> None:
        self.calls, self.leave_at = 0, leave_at

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.leave_at:
            raise LookLeft

"""Minor page faults of a call: memory that the allocator gave back to the system and has to fetch once more.

An activation of 6 MB whose pages must be fetched costs some ten times what it costs where they are still there, so a
time beside a count of faults says what it is made of.
"""

import resource
import statistics
from collections.abc import Callable


class Counted:
    """A call that counts the minor page faults of the process while it runs.

    >>> call = Counted(lambda: bytearray(2**24))
    >>> len(call()), len(call.counts)
    (16777216, 1)
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run
        self.counts: list[int] = []

    def __call__(self) -> object:
        before = _faults()
        result = self.run()
        self.counts.append(_faults() - before)
        return result

    def median(self) -> float:
        """Of all calls so far."""
        return statistics.median(self.counts)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

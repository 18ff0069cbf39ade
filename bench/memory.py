"""Peak memory of a call on the CPU, as torch's own allocator sees it."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held during ``call``, above what it held before.

    What was there before counts as held throughout, also where the call frees it: the profiler does not know its size.
    Memory that does not come from torch's allocator (NumPy's, or buffers that a library allocates for itself) is not
    seen.

    >>> import torch
    >>> peak(lambda: torch.zeros(1000) + torch.zeros(1000))
    12000
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # so that what it returns is not freed before the profiler stops
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest

"""What is measured on: a CUDA device, or the processor to try the bench itself."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from bench import machine, memory

Run = Callable[[], object]


class Device(Protocol):
    """Where things run, and how their time and memory are told. A stamp is a moment in the order of the work."""

    kind: str

    def name(self) -> str: ...
    def cache(self) -> int: ...  # bytes of the last level
    def stamp(self) -> Any: ...
    def between(self, start: Any, end: Any) -> float: ...  # seconds, once synchronised
    def synchronize(self) -> None: ...
    def peak(self, call: Run) -> int: ...
    def captured(self, call: Run) -> Run: ...


class Processor:
    kind = "cpu"

    def name(self) -> str:
        return machine.model()

    def cache(self) -> int:
        return 0

    def stamp(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        pass

    def peak(self, call: Run) -> int:
        return memory.peak(call)

    def captured(self, call: Run) -> Run:
        raise NotImplementedError("graphs of launches are CUDA's")


class Cuda:
    kind = "cuda"

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def cache(self) -> int:
        return torch.cuda.get_device_properties().L2_cache_size

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak(self, call: Run) -> int:
        """The most bytes that torch's allocator held during ``call``, above what it held before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated() - before
        del kept
        return highest

    def captured(self, call: Run) -> Run:
        """A replay of what ``call`` launches, which has run before. Its results are nobody's."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Processor, "cuda": Cuda}

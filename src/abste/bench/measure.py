"""Time and memory, of functions that take turns. Needs numpy alone."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MOST_ROUNDS = 5000


class Spread(NamedTuple):
    """Times of many calls, in seconds.

    Attributes:
        median, low, high: the median and the quartiles.
        calls: how many.
    """

    median: float
    low: float
    high: float
    calls: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Of one call or more."""
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, low, high, len(times))


class Call(NamedTuple):
    """One timed call.

    Attributes:
        seconds: how long it took.
        gauge: the larger of what the gauge read before and after it; 0 without one.
    """

    seconds: float
    gauge: float


def by_turns(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least: int = 3,
    rest: float = 0.0,
    gauge: Callable[[], float] | None = None,
) -> dict[str, list[Call]]:
    """Call functions in turn, there and back, so that noise meets all of them, until their time is used up.

    Each is called once before all; then twice in each of its turns, and timed the second time, with its weights in the
    caches as in steady use. One that is slow drops out when it has had its share of the time and ``least`` turns.

    Args:
        functions: what to call, by name.
        seconds: for all of them together.
        least: turns that each has in any case.
        rest: seconds to sleep before a turn, for threads of the one before to stop spinning.
        gauge: reads how disturbed the machine is; called before and after each timed call.

    Returns:
        The timed calls of each.
    """
    calls: dict[str, list[Call]] = {name: [] for name in functions}
    used = dict.fromkeys(functions, 0.0)
    share = seconds / max(1, len(functions))
    for function in functions.values():  # what is done once
        function()
    for number in range(MOST_ROUNDS):
        names = [name for name in functions if number < least or used[name] < share]
        for name in names[:: 1 if number % 2 else -1]:
            if rest:
                time.sleep(rest)
            before = time.perf_counter()
            functions[name]()
            disturbed = gauge() if gauge else 0.0
            start = time.perf_counter()
            functions[name]()
            end = time.perf_counter()
            disturbed = max(disturbed, gauge()) if gauge else 0.0
            calls[name].append(Call(end - start, disturbed))
            used[name] += time.perf_counter() - before
        if not names:
            break
    return calls


def resident() -> tuple[int, int]:
    """Resident memory of this process in bytes: now, and the highest so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return highest, highest
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, highest = (1024 * int(fields[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    return now, highest


def rise(function: Callable[[], object]) -> int:
    """Bytes by which a call raises the highest resident memory above what is resident now."""
    before, highest = resident()
    forget = Path("/proc/self/clear_refs")
    if highest > before and forget.exists():
        with contextlib.suppress(OSError):  # a sandbox: the rise is then that above what imports took
            forget.write_text("5")  # the highest so far is what there is now
    function()
    return max(0, resident()[1] - before)

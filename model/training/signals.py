"""The signals that end a run, and the latest one that this process received."""

import signal

PREEMPTION = signal.SIGUSR1, signal.SIGUSR2
"""`sbatch --signal=USR1@120` sends SIGUSR1 before the time limit and before a preemption, submitit SIGUSR2."""

SIGNALS = signal.SIGINT, signal.SIGTERM, *PREEMPTION
"""Signals that end a run after its step."""

_latest: list[int] = []
"""The latest signal that a run or job of this process received."""


def remember(number: int) -> None:
    """Keeps a signal for `hand_on`. The handlers of a run, and of a job in a process of its own, call it."""
    _latest[:] = [number]


def hand_on() -> None:
    """Sends this process the signal of a preemption that ended its run once more, if the job's launcher handles it: it
    requeues the job and exits. Call it when the run's folder is complete."""
    while _latest:
        number = _latest.pop()
        if number in PREEMPTION and callable(signal.getsignal(number)):
            signal.raise_signal(number)

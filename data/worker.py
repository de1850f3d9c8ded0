"""The first step of every process that loads batches."""

import os
import signal


def start_worker(worker: int) -> None:
    """Ignores SIGTERM. A cluster sends it to every process of a job, and the main process needs batches to finish its
    step and save. Workers end with the main process. Each tokenizes on one core."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

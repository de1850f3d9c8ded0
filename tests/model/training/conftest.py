import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for stand_ins, whichever import mode pytest uses


@pytest.fixture(autouse=True)
def one_thread():
    """Bitwise comparisons must not depend on how many cores happen to be free."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

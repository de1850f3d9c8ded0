"""Arrays in files."""

import io
from pathlib import Path

import numpy as np


def save_array(file: Path, numbers: np.ndarray) -> None:
    """Writes an array as .npy."""
    content = io.BytesIO()  # an error of NumPy's own writing to a full disk has no error number
    np.save(content, numbers)
    file.write_bytes(content.getvalue())

"""Sources of documents. A class for each kind of place:

    standard_library.py   the Python source on this machine
    files.py              the user's own files
    hub.py                datasets of the Hugging Face hub, and local dataset folders

A new source is a subclass of `Source` (base.py) that a config names as `data.source._target_`.
"""

from .base import Source
from .files import Files
from .hub import Hub
from .splits import SPLITS
from .standard_library import StandardLibrary

__all__ = ["SPLITS", "Files", "Hub", "Source", "StandardLibrary"]

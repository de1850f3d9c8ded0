"""Sources of documents. A class for each kind of place:

    standard_library.py   the Python source on this machine
    code.py               installed packages and repositories (import_order.py orders their files)
    files.py              the user's own files (file_search.py finds them, file_rows.py reads them)
    genome.py             DNA in FASTA files
    time_series.py        columns of numbers in .csv files
    token_shards.py       files of tokens that others prepared
    hub.py                datasets of the Hugging Face hub, and local dataset folders (hub_shards.py reads their files)
    recall.py             recall tasks in text, which generate their sequences (../sequences/generated.py)
    mixture.py            several of these, with weights

bad_documents.py has the policy for documents that cannot be read. A new source is a subclass of `Source`, or of
`GeneratingSource` if it generates its sequences (base.py), that a config names as `data.source._target_`.
"""

from .bad_documents import BadDocuments
from .base import GeneratingSource, Source
from .code import Code
from .files import Files
from .genome import Genome
from .hub import Hub
from .mixture import MixedSource, Mixture
from .recall import Recall
from .splits import SPLITS
from .standard_library import StandardLibrary
from .time_series import TimeSeries
from .token_shards import TokenShards

__all__ = [
    "SPLITS",
    "BadDocuments",
    "Code",
    "Files",
    "GeneratingSource",
    "Genome",
    "Hub",
    "MixedSource",
    "Mixture",
    "Recall",
    "Source",
    "StandardLibrary",
    "TimeSeries",
    "TokenShards",
]

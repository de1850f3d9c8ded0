"""Configs that would run code if whatever they name were called, as a stranger may put them into a checkpoint."""

import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Config = dict[str, Any]
MODULE = "a_strangers_module"


class _Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


class Traps:
    """Files that an attack needs, in `folder`. `ran` appears, or `victim` goes, if its code runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.ran, self.victim, self.pickle, self.script = (
            folder / name for name in ("ran", "victim", "trap.pkl", f"{MODULE}.py")
        )
        self.victim.mkdir()
        self.pickle.write_bytes(pickle.dumps(_Trap(self.ran)))
        self.script.write_text(
            f"import os\nos.makedirs({str(self.ran)!r}, exist_ok=True)\n"
            "from kernels.patterns import Window\nclass MyPattern(Window):\n    pass\n"
        )
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, MODULE, raising=False)

    def check(self) -> None:
        assert not self.ran.exists() and self.victim.is_dir() and MODULE not in sys.modules, "the stranger's code ran"


def put(key: str, make: Callable[[Traps], Config]) -> Callable[[Config, Traps], Config]:
    def attacked(config: Config, traps: Traps) -> Config:
        config = copy.deepcopy(config)
        *groups, name = key.split(".")
        place = config
        for group in groups:
            place = place[group]
        place[name] = (place[name] if key == "data" else {}) | make(traps)  # lengths are read before data are built
        return config

    return attacked


CALLS: dict[str, Callable[[Traps], Config]] = {
    "os.system": lambda t: {"_target_": "os.system", "command": f"mkdir {t.ran}"},
    "torch.load": lambda t: {"_target_": "torch.load", "f": str(t.pickle), "weights_only": False},
    "shutil.copyfile": lambda t: {"_target_": "shutil.copyfile", "src": str(t.pickle), "dst": str(t.ran)},
    "shutil.rmtree": lambda t: {"_target_": "shutil.rmtree", "path": str(t.victim)},
    "runpy.run_path": lambda t: {"_target_": "runpy.run_path", "path_name": str(t.script)},
    "os.mkdir by our module": lambda t: {"_target_": "data.sources.os.mkdir", "path": str(t.ran)},
    "an import": lambda t: {"_target_": f"{MODULE}.MyPattern", "width": 8, "sink_tokens": 0},
    "a dotless name": lambda t: {"_target_": "exec", "source": f"import os; os.mkdir({str(t.ran)!r})"},
    "a function of ours": lambda t: {"_target_": "data.preparation.prepare", "cache": str(t.ran)},
    "a nested target": lambda t: {
        **{"_target_": "data.sources.Files", "text_column": {"_target_": "os.mkdir", "path": str(t.ran)}}
    },
    "a target in a list": lambda t: {
        **{"_target_": "data.tokenizers.BPE", "vocabulary": [{"_target_": "os.mkdir", "path": str(t.ran)}]}
    },
    "_args_": lambda t: {
        **{"_target_": "data.sources.Files", "_args_": [{"_target_": "os.mkdir", "path": str(t.ran)}]}
    },
    "_partial_": lambda t: {"_target_": "os.mkdir", "_partial_": True, "path": str(t.ran)},
    "_partial_ of ours": lambda t: {"_target_": "data.sources.Files", "_partial_": True, "text_column": "text"},
    "a list for a target": lambda t: {"_target_": ["os", "mkdir"], "path": str(t.ran)},
    "no target": lambda t: {"_target_": None, "path": str(t.ran)},
}

PATTERN = "attention.patterns.local"
ATTACKS = {
    f"{key}: {name}": put(key, call)
    for key in ("data", "data.source", "data.tokenizer", PATTERN)
    for name, call in CALLS.items()
}
"""{where and what: (a config, traps) -> that config with the attack in it}."""


def trusting_itself(config: Config, traps: Traps) -> Config:
    """The stranger's config grants itself trust in the stranger's module."""
    attacked = ATTACKS[f"{PATTERN}: an import"](config, traps)
    return attacked | {"trust": [f"{MODULE}.MyPattern"]}

"""Running the project's commands in tests, as a user would, and composing their configs without running them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, open_dict

ROOT = Path(__file__).parent.parent


def compose(*overrides: str, config_name: str = "train") -> dict[str, Any]:
    """The config that a command line composes, as plain dicts."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return OmegaConf.to_container(compose(config_name, overrides=list(overrides)), resolve=True)


def resolved(*overrides: str) -> dict[str, Any]:
    """What train.py makes of a command line."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from configs.resolve import resolve

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    try:
        with open_dict(config):
            del config["hydra"]
        return resolve(config)
    finally:
        HydraConfig.instance().cfg = None


def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` in the repository's root, offline, on one thread, without a GPU; fails the test with its
    output."""
    quiet = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    users = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=users | quiet | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, f"{arguments}:\n{result.stdout}\n{result.stderr}"
    return result

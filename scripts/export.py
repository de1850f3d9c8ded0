"""Exports a trained run as a folder that Hugging Face's transformers loads.

    python scripts/export.py checkpoint=outputs/window/2026-01-31_12-00-00_000000 output=outputs/exported
    python scripts/export.py checkpoint=RUN_DIR/best output=FOLDER dtype=bfloat16

The folder holds config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json. It is
written whole or not at all.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(config: DictConfig) -> None:
    from configs.trust import trust_named
    from scripts.console import user_errors

    with user_errors():
        export_run(trust_named(OmegaConf.to_container(config, resolve=True, throw_on_missing=True)))


def export_run(config: dict[str, Any]) -> list[Path]:
    """Writes the folder `config["output"]` and prints its files, and the code that loads them. Returns the files."""
    from configs.checks import check_export

    check_export(config)
    import torch

    from configs.errors import ConfigError
    from configs.runs import open_run
    from data.tokenizers import hugging_face_files
    from model.pretrained.errors import ExportError
    from model.pretrained.export import FARSIGHT, export, layer_windows
    from scripts.console import ROOT

    output = Path(config["output"]).expanduser()
    run = open_run(config["checkpoint"], "cpu", "32-true")
    model, tokenizer = run.model, run.tokenizer
    files = hugging_face_files(tokenizer, model.config.max_length)
    try:
        written = export(output, model, files, tokenizer.bos, tokenizer.vocabulary, getattr(torch, config["dtype"]))
    except ExportError as error:
        raise ConfigError(f"checkpoint={config['checkpoint']}: {error}") from None
    for file in written:
        print(f"{file.stat().st_size:>15,} bytes  {file}")
    more = ""
    if layer_windows(model.config, model.plan) is None:
        more = f', attn_implementation="{FARSIGHT}"'
        print("\n# no class of transformers has these patterns: a file of this repository computes them\nimport sys")
        print(f"sys.path.insert(0, {str(ROOT)!r})\nfrom model.pretrained import attention_interface")
    print("\nfrom transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"tokenizer = AutoTokenizer.from_pretrained({str(output)!r})")
    print(f"model = AutoModelForCausalLM.from_pretrained({str(output)!r}{more})")
    return written


if __name__ == "__main__":
    from scripts.console import run

    run(main)

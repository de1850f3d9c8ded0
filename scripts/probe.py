"""Measures which layers of a dense model need full attention, on long documents.

    python scripts/probe.py checkpoint=RUN_DIR                                 windows of 256, the run's test split
    python scripts/probe.py checkpoint=RUN_DIR data=files data.path=books/ attention.patterns.local.width=1024
    python scripts/probe.py checkpoint=RUN_DIR attention=hierarchical attention.patterns.hierarchy.pooling=mean
    python scripts/probe.py checkpoint=RUN_DIR per_head=true measure=all

The result is printed, and written to probe.json, probe.csv and report/probe.png in the run's folder, which a later
probe overwrites. A probe that was killed continues when the command is given again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="../configs", config_name="probe")
def main(config: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from configs.resolve import resolve_evaluated
    from scripts.console import user_errors

    with user_errors():
        probe(resolve_evaluated(config), HydraConfig.get().overrides.task)


def probe(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Probes the run `config["checkpoint"]`, prints the tables and writes probe.json, probe.csv and the picture.

    overrides: the arguments of the command line. Returns the content of probe.json.
    """
    from configs.checks import check_probe

    check_probe(config, overrides)
    from rich.console import Console

    from configs.probing import build_replacement, check_probed, probe_run
    from configs.runs import open_documents, open_run
    from model.training.run_folder import check_writable
    from scripts.console import progress_bar
    from scripts.reporting.probe_tables import layer_table, recommendation, schedule_table, write_probe

    build_replacement(config["attention"])
    run = open_run(config["checkpoint"], config["accelerator"], config["precision"])
    check_probed(run, config["length"])
    documents, name = open_documents(run, config["split"], config.get("data"))
    output = Path(config["output"]) if config["output"] else run.folder / "probe.json"
    check_writable(output.parent, config["output"])
    result, store = probe_run(run, documents, name, config, overrides, output.parent, progress_bar)
    picture = output.with_suffix(".png") if config["output"] else run.folder / "report" / "probe.png"
    write_probe(result, output, picture)
    store.delete()
    console = Console()
    for table in (layer_table(run.label, result), schedule_table(result)):
        console.print(table)
    if result["documents"] == 1:
        log.warning("one document: the changes have no bounds")
    console.print(recommendation(result, run.start), soft_wrap=True, highlight=False, markup=False)
    log.info("written to %s, %s and %s", output, output.with_suffix(".csv"), picture)
    return result


if __name__ == "__main__":
    from scripts.console import run

    run(main)

"""Sweeps: one command, many runs, resumable and on an equal footing.

    configs/sweep/*.yaml --points.py--> jobs --budget.py--> jobs of equal cost --launch.py--> launcher --jobs.py--> runs

Read in this order:

    settings.py   what a YAML in configs/sweep says
    points.py     the grid: from what varies, and the command line, to the overrides of every job; labels
    budget.py     sweep.match: the same tokens, training time or training FLOPs for every job
    manifest.py   outputs/<sweep>/manifest.json and the locks: what is waiting, running, done, failed
    jobs.py       one job, in whatever process a launcher has put it
    orphans.py    such a process ends with the sweep that has started it
    composer.py   the command line, composed: configs, and Hydra's launcher
    launch.py     python train.py -m sweep=...: what is missing goes to the launcher
    search.py     sweep=search: Optuna chooses the points

Hydra's own sweepers know only products of single settings, stop at nothing and remember nothing, and Hydra takes no
other sweeper than an installed plugin. So `-m sweep=...` is composed, expanded and launched here, by Hydra's config
loader, override grammar and launchers (basic, joblib, submitit); `-m` without a sweep is Hydra's.
"""

from scripts.sweeping.manifest import Job, Manifest, read_manifest

__all__ = ["Job", "Manifest", "read_manifest"]

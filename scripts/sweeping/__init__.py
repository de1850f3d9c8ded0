"""Sweeps: one command runs many jobs with equal budgets, continues after interruptions, and writes a report.

    configs/sweep/*.yaml -> points.py: jobs -> budget.py: jobs of equal cost -> sweep.py: launcher -> worker.py: runs

Read in this order:

    settings.py         the `sweep` config group, checked
    points.py           the grid: from the varied settings and the command line to the overrides of every job; labels
    budget.py           sweep.match: the same tokens, training time or training FLOPs for every job
    composer.py         composes configs from the command line, and creates Hydra's launcher
    plan.py             the settings and jobs of a command line
    locks.py            locks on outputs/<sweep>/manifest.json (scripts/reporting/manifest.py) and on the jobs
    own_process.py      runs a job as `python train.py` in a process of its own
    parent_watchdog.py  ends the jobs' processes when the sweep's process is gone
    worker.py           runs one job, in any process that a launcher chooses
    sweep.py            hands the jobs that are not done to the launcher
    search.py           sweep=search: Optuna chooses the points
    launch.py           python train.py -m sweep=...

Hydra's own sweepers vary single settings only, stop at the first failure, and cannot continue; and Hydra accepts other
sweepers only as installed plugins. So this package composes, expands and launches `-m sweep=...` itself, with Hydra's
config loader, override grammar and launchers (basic, joblib, submitit). `-m` without a sweep is Hydra's multirun.
"""

"""Training: what happens to a model between a composed config and a finished run folder.

Read in this order:

    module.py       LanguageModel: the loss, its units, and what a validation measures
    optimizer.py    parameter groups, AdamW or Muon, learning-rate schedules
    muon.py         Muon, which updates all matrices of one shape at once
    horizon.py      when a run ends: steps, or seconds
    fit.py          fit(): puts the parts below around Lightning's loop
    run_folder.py   the folder of one run: config.yaml, summary.json, train.log, checkpoints/
    metrics.py      metrics.csv, and the callback that decides what is logged when
    efficiency.py   tokens per second, memory, attention density, FLOPs, MFU
    checkpoints.py  last.ckpt and best.ckpt, written atomically; exact resume
    interrupt.py    SIGTERM and Ctrl-C
    progress.py     the console

Imports are explicit (`from model.training.fit import fit`), so that opening a run folder does not import Lightning.
"""

"""Training: from a built model to a finished run folder.

Read in this order:

    module.py       LanguageModel: the loss of a step, and the validation
    loss_sums.py    sums of nats, tokens and bytes, and the metrics made of them
    step_checks.py  a loss or gradient that is not finite: stop, or skip the step
    step_graph.py   training steps that are replayed from a CUDA graph
    freezing.py     parameters that do not train
    optimizer.py    parameter groups, AdamW or Muon, learning-rate schedules
    muon.py         Muon, which updates all matrices of one shape at once
    run_length.py   the end of a run: a number of steps, or of seconds
    phases.py       sequences or windows that grow
    fit.py          fit(): joins the files below in Lightning's Trainer
    strategies.py   several devices: DDP and FSDP
    ranks.py        all ranks end when one is killed, hangs or fails
    run_folder.py   the folder of one run: config.yaml, summary.json, train.log, checkpoints/
    metrics.py      metrics.csv, and the callback that logs
    efficiency.py   tokens per second, attention density, FLOPs, MFU
    memory_use.py   the peak memory of a device or of this process
    profiling.py    how a step uses the time of the device
    checkpoints.py  last.ckpt and best.ckpt, written atomically; exact resume
    failures.py     out of memory, and other errors of training, with their messages
    interrupt.py    SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C (signals.py: the latest of them)
    progress.py     the console
    slurm.py        runs in a SLURM job
    storage.py      files that are written whole or not at all

Imports are explicit (`from model.training.fit import fit`), so that opening a run folder does not import Lightning.
"""

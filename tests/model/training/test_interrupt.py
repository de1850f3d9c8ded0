"""What happens around a signal; that the run resumes exactly is in test_exact_resume.py."""

import signal
import threading

import lightning
import pytest
import torch
from stand_ins import TRAINER, TinyData, new_module, run_folder, train

from model.training.fit import fit
from model.training.signals import hand_on


class Press(lightning.Callback):
    """Sends signals to itself in one micro-batch."""

    def __init__(self, *signals, batch=4):
        self.signals, self.batch = signals, batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.batch:
            for number in self.signals:
                signal.raise_signal(number)


@pytest.fixture(autouse=True)
def handlers_come_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    handlers = [lambda *_: None, lambda *_: None, lambda *_: None, lambda *_: None]
    before = [signal.signal(number, handler) for number, handler in zip(numbers, handlers, strict=True)]
    yield
    after = [signal.signal(number, handler) for number, handler in zip(numbers, before, strict=True)]
    assert after == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_step_is_finished_first(tmp_path, number, caplog):
    result = train(tmp_path, accumulate=3, callbacks=[Press(number)])
    assert (result.state, result.step) == ("interrupted", 2)
    saved = torch.load(result.last, weights_only=True)
    assert saved["global_step"] == 2 and saved["TinyData"]["cursor"] == 2 * 3 * 2
    assert run_folder(tmp_path).read_summary()["state"] == "interrupted"
    assert f"continue with: python train.py resume={tmp_path}" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_gets_no_checkpoint_and_no_handler_of_its_own(tmp_path, monkeypatch, number):
    """Lightning would save hpc_ckpt_1.ckpt in the middle of the step, and requeue the job by itself."""
    for key, value in dict(JOB_ID=4711, JOB_NAME="train", NTASKS=1, PROCID=0, LOCALID=0, NODEID=0).items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as in a new process; Lightning replaces no other handler
    result = train(tmp_path, accumulate=3, callbacks=[Press(number)])
    assert (result.state, result.step) == ("interrupted", 2)
    assert sorted(file.name for file in tmp_path.rglob("*.ckpt")) == ["last.ckpt"]
    assert signal.signal(signal.SIGUSR1, before) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_preemption_goes_on_to_the_launchers_handler_when_the_run_is_saved(tmp_path, number):
    """To submitit's, which requeues the job and exits. SIGTERM is no preemption."""
    received = []
    before = signal.signal(number, lambda number, frame: received.append(number))
    train(tmp_path, callbacks=[Press(number)])
    assert not received
    hand_on()
    hand_on()
    assert received == ([] if number == signal.SIGTERM else [number])
    signal.signal(number, before)


def test_repeated_sigterm_changes_nothing(tmp_path):
    result = train(tmp_path, callbacks=[Press(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)])
    assert (result.state, result.step) == ("interrupted", 5)


def test_second_ctrl_c_aborts_at_once(tmp_path):
    """With KeyboardInterrupt, and not with the SystemExit that Lightning makes of it and that would end a sweep."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, accumulate=3, callbacks=[Press(signal.SIGINT, signal.SIGINT)])
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert run_folder(tmp_path).read_summary()["state"] == "failed"


def test_ctrl_c_before_training_aborts_at_once(tmp_path):
    class SlowToPrepare(TinyData):
        def prepare_data(self):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(new_module(), SlowToPrepare(), run_folder(tmp_path), **TRAINER)


def test_in_the_last_step_there_is_nothing_left_to_interrupt(tmp_path):
    result = train(tmp_path, max_steps=5, callbacks=[Press(signal.SIGTERM)])
    assert (result.state, result.step) == ("finished", 5)
    assert "validation_loss" in result.summary


def test_an_error_is_not_swallowed(tmp_path):
    class Fail(lightning.Callback):
        def on_train_batch_start(self, *_):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path, callbacks=[Fail()])
    assert run_folder(tmp_path).read_summary()["state"] == "failed"


def test_outside_the_main_thread(tmp_path):
    """Where Python allows no handlers (a notebook's or a server's thread), training still works."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path, max_steps=2)))
    thread.start()
    thread.join()
    assert results[0].state == "finished"

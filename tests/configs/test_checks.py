"""Impossible settings fail before any work starts, in one line that names the key, the value and what is accepted."""

import pytest

from configs.build import ConfigError, build_plan
from configs.checks import check
from configs.group_checks import check_backend, check_data
from data import CorpusError
from tests.commands import compose

WRONG = [
    # overrides, and what the line must name
    (["attention.patterns.local.width=0"], ["attention.patterns.local.width=0", ">= 1"]),
    (["~logger"], ["logger: missing", "must be"]),
    (["attention.patterns.local.sink_tokens=-1"], ["sink_tokens=-1", ">= 0"]),
    (
        ["attention.patterns.local._target_=kernels.patterns.Windw"],
        ["kernels.patterns.Windw", "kernels.patterns.Window"],
    ),
    (["attention.patterns.local._target_=torch.nn.Linear"], ["torch.nn.Linear", "kernels.patterns.Pattern"]),
    (
        ["+attention.patterns.local.depth=3"],
        ["attention.patterns.local.depth=3", "the keys here are width, sink_tokens"],
    ),
    (["attention.schedule=[local,nowhere]"], ["'nowhere'", "local"]),
    (["attention.schedule=[]"], ["attention.schedule=[]", "a list of at least one"]),
    (["attention.schedule=[[local,local]]"], ["2 patterns", "(4)"]),
    (["attention.block=100"], ["attention.block=100", "128"]),
    (["attention.backend=cuda"], ["attention.backend=cuda", "blocked"]),
    (["attention.backend=flex"], ["attention.backend=flex", "must be auto, reference or blocked"]),
    (["attention=strided", "attention.patterns.strided.columns=4096"], ["columns=4096", "1024"]),
    (["attention=fixed", "attention.patterns.fixed.align=page"], ["align='page'", "'document' or 'sequence'"]),
    (
        ["attention=routed", "~attention.patterns.routed.top_k"],
        ["attention.patterns.routed.top_k: missing", "an integer"],
    ),
    (["attention=routed", "attention.patterns.routed.window=0"], ["patterns.routed.window=0", ">= 1"]),
    (["attention=routed", "attention.patterns.routed.indexer_loss=inf"], ["indexer_loss=inf", "a finite number"]),
    (["attention=hierarchical", "attention.patterns.hierarchy.window=0"], ["hierarchy.window=0", ">= 1"]),
    (["attention=hierarchical", "attention.patterns.hierarchy.spans=[16,24]"], ["spans=[16, 24]", "multiple"]),
    (["attention=hierarchical", "attention.patterns.hierarchy.reaches=[]"], ["reaches=[]", "one fewer than spans"]),
    (["attention=hierarchical", "attention.patterns.hierarchy.pooling=max"], ["pooling='max'", "mean, learned"]),
    (
        ["attention=hierarchical", "attention.schedule=[[hierarchy,hierarchy,hierarchy,hierarchy]]"],
        ["gives a KV head 'hierarchy', which", "whole layers", "masks over the tokens"],
    ),
    (
        [
            "attention=dense",
            "attention.patterns.full._target_=kernels.patterns.hierarchical.Summaries",
            "+attention.patterns.full.span=4",
        ],
        ["full._target_=kernels.patterns.hierarchical.Summaries: must be a mask", "kernels.patterns.Hierarchical"],
    ),
    (["model.kv_heads=3"], ["model.kv_heads=3", "heads (4)"]),
    (["model.width=-1"], ["model.width=-1", ">= 1"]),
    (["model.rope_scaling=magic"], ["model.rope_scaling=magic", "yarn"]),
    (["data.sequence_length=0"], ["data.sequence_length=0", ">= 1"]),
    (["data.sequence_length=2000000"], ["data.sequence_length=2000000", "model.max_length=1048576"]),
    (["data.packing=tetris"], ["data.packing=tetris", "contiguous", "best_fit"]),
    (["data.length_weights={4096:0}"], ["data.length_weights", "4096", ">= 1"]),
    (["data.length_weights={long:2}"], ["data.length_weights", "long", "integer"]),
    (["data=files", "data.path=/no/such/folder"], ["data.path=/no/such/folder"]),
    (["phases=3"], ["phases=3", "a list of at least one", "or null"]),
    (["phases=[{data.sequence_length: 1024}]"], ["phases=[{data.sequence_length:1024}]", "step"]),
    (["phases=[{step: 5}]"], ["phases[0].step=5", "0"]),
    (["phases=[{step: 0},{step: 9},{step: 9}]"], ["phases[2].step=9", "above 9"]),
    (["phases=[{step: 0, data.sequence_length: 1000}]"], ["data.sequence_length=1000", "a divisor", "4096"]),
    (["phases=[{step: 0, data.sequence_length: 1.5}]"], ["phases[0].data.sequence_length=1.5", "an integer >= 1"]),
    (["phases=[{step: 0, data.sequence_length: 1024}]"], ["data.sequence_length=4096", "1024", "phases[0]"]),
    (["phases=[{step: 0},{step: 1, data.sequence_length: 4096}]"], ["phases[0]={step:0}", "data.sequence_length"]),
    (
        ["phases=[{step: 0, data.sequence_length: 2048}, {step: 1, data.sequence_length: 1024}]"],
        ["phases[1].data.sequence_length=1024", "at least 2048"],
    ),
    (
        ["phases=[{step: 0, data.sequence_length: 1024}, {step: 1, data.sequence_length: 4096}]", "data.packing=whole"],
        ["data.packing=whole", "contiguous"],
    ),
    (
        ["attention=dense", "phases=[{step: 0, attention.patterns.full.width: 64}]"],
        ["phases[0].attention.patterns.full.width=64", "left out", "step, data.sequence_length"],
    ),
    (
        ["phases=[{step: 0, data.batch_size: 64}]"],
        ["phases[0].data.batch_size=64", "left out", "attention.patterns.local.width"],
    ),
    (
        [
            "phases=[{step: 0, data.sequence_length: 128}, {step: 1, data.sequence_length: 4096}]",
            *("trainer.devices=2", "trainer.context_parallel=2"),
        ],
        ["data.sequence_length=128", "a multiple of 256 tokens"],
    ),
    (
        [
            "attention=strided",
            "phases=[{step: 0, attention.patterns.strided.window: 0}]",
        ],
        ["phases[0].attention.patterns.strided.window=0", ">= 1"],
    ),
    (
        [
            *("data=hub", "data.path=name", "data.source.streaming=true"),
            "phases=[{step: 0, data.sequence_length: 128}, {step: 1, data.sequence_length: 4096}]",
        ],
        ["data.source.streaming=true", "false where phases change data.sequence_length"],
    ),
    (["data=hub", "data.path=name", "data.source.streams=2"], ["data.source.streams=2", "null without"]),
    (["trainer.max_steps=0"], ["trainer.max_steps=0", ">= 1"]),
    (["trainer.max_steps=null"], ["trainer.max_steps=null", "integer >= 1"]),
    (["trainer.max_seconds=0"], ["trainer.max_seconds=0", "a number > 0 or null"]),
    (["trainer.max_seconds=1m"], ["trainer.max_seconds=1m", "a number > 0 or null"]),
    (["sweep=patterns"], ["sweep=patterns", "python train.py -m sweep=patterns"]),
    (["trainer.gradient_clip=-1"], ["trainer.gradient_clip=-1", "a number > 0 or null"]),
    (["trainer.precision=8-bit"], ["trainer.precision=8-bit", "32-true"]),
    (["trainer.precision=16-mixed"], ["trainer.precision=16-mixed", "bf16-mixed"]),
    (["trainer.accelerator=tpu"], ["trainer.accelerator=tpu", "cpu"]),
    (["+trainer.max_epochs=3"], ["trainer.max_epochs=3", "max_steps"]),
    (["optimizer.name=sgd"], ["optimizer.name=sgd", "adamw"]),
    (["optimizer.learning_rate=0"], ["optimizer.learning_rate=0", "> 0"]),
    (["optimizer.schedule.name=step"], ["optimizer.schedule.name=step", "cosine"]),
    (["evaluation.split=dev"], ["evaluation.split=dev", "validation"]),
    (["evaluation.protocol.name=full"], ["evaluation.protocol.name=full", "sliding"]),
    (["evaluation.protocol.stride=9999"], ["protocol.stride=9999", "4096"]),
    # Settings that were a traceback, a line without a key, or accepted, before configs/schema.py
    (["trainer.strategy=foo"], ["trainer.strategy=foo", "Lightning"]),
    (["trainer.strategy=fsdp"], ["trainer.strategy=fsdp", "trainer=fsdp"]),
    (["trainer.strategy=model_parallel"], ["trainer.strategy=model_parallel", "trainer=fsdp"]),
    (["trainer.strategy=fsdp2", "trainer.precision=64-true"], ["trainer.strategy=fsdp2", "64-true", "32-true"]),
    (["trainer.devices=0"], ["trainer.devices=0", "an integer >= 1"]),
    (["trainer.devices=-1"], ["trainer.devices=-1", "processes on a CPU"]),
    (["trainer.devices=[0]"], ["trainer.devices=[0]", "processes on a CPU"]),
    (["trainer.devices=100000"], ["trainer.devices=100000", "CPU cores"]),
    (["trainer.context_parallel=0"], ["trainer.context_parallel=0", "an integer >= 1"]),
    (["trainer.context_parallel=2"], ["trainer.context_parallel=2", "the number of devices, 1"]),
    (
        ["trainer.devices=2", "trainer.context_parallel=2", "data.sequence_length=4000"],
        ["data.sequence_length=4000", "a multiple of 256 tokens", "trainer.context_parallel=2"],
    ),
    (
        [
            *("attention=hierarchical", "attention.patterns.hierarchy.spans=[16,1024]", "trainer.devices=2"),
            *("trainer.context_parallel=2", "data.sequence_length=5120"),
        ],
        ["data.sequence_length=5120", "a multiple of 2048 tokens"],
    ),
    (
        ["trainer.devices=2", "trainer.context_parallel=2", "trainer.strategy=ddp_spawn"],
        ["trainer.strategy=ddp_spawn", "auto, ddp or fsdp2 with trainer.context_parallel=2"],
    ),
    (
        ["trainer.devices=2", "trainer.context_parallel=2", "model.rope_scaling=dynamic"],
        ["model.rope_scaling=dynamic", "trainer.context_parallel=2"],
    ),
    (["trainer.max_seconds=nan"], ["trainer.max_seconds=nan", "a finite number > 0"]),
    (["trainer.max_seconds=inf"], ["trainer.max_seconds=inf", "a finite number > 0"]),
    (["trainer.max_steps=true"], ["trainer.max_steps=true", "an integer >= 1"]),
    (["trainer.gradient_clip=abc"], ["trainer.gradient_clip=abc", "a number > 0"]),
    (["trainer.fp8=true"], ["trainer.fp8=true", "false, mlp or mlp_and_head"]),
    (["trainer.cuda_graph=yes_please"], ["trainer.cuda_graph=yes_please", "auto"]),
    (["trainer=cpu", "trainer.cuda_graph=true"], ["trainer.cuda_graph=true", "false or auto on a CPU"]),
    (["trainer.fp8=mlp", "trainer.precision=bf16-mixed"], ["trainer.fp8=mlp", "false on a CPU"]),
    (["trainer.compile=1"], ["trainer.compile=1", "true or false"]),
    (["trainer.max_skipped_steps=-1"], ["trainer.max_skipped_steps=-1", ">= 0"]),
    (["~trainer.accumulate"], ["trainer.accumulate: missing", "an integer >= 1"]),
    (["data.batch_size=2.5"], ["data.batch_size=2.5", "an integer >= 1"]),
    (["data.batch_size=null"], ["data.batch_size=null", "an integer >= 1"]),
    (["data.sequence_length=true"], ["data.sequence_length=true", "an integer >= 1"]),
    (["data.workers=-1"], ["data.workers=-1", ">= 0"]),
    (["data.cache=null"], ["data.cache=null", "a text"]),
    (["data.source.tests=maybe"], ["data.source.tests=maybe", "true or false"]),
    (["+data.source.test=true"], ["data.source.test=true", "the keys here are tests"]),
    (["data.tokenizer.vocabulary=many"], ["data.tokenizer.vocabulary=many", "an integer"]),
    (["optimizer.betas=0.9"], ["optimizer.betas=0.9", "a list of 2"]),
    (["optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]", "a list of 2"]),
    (["optimizer.betas=[0.9,1]"], ["optimizer.betas=[0.9,1]", "< 1"]),
    (["optimizer.weight_decay=-1"], ["optimizer.weight_decay=-1", ">= 0"]),
    (["optimizer.momentum=1.5"], ["optimizer.momentum=1.5", "< 1"]),
    (["optimizer=adamw", "+optimizer.momentum=0.9"], ["optimizer.momentum=0.9", "the keys here are name"]),
    (["optimizer.schedule.warmup_fraction=2"], ["optimizer.schedule.warmup_fraction=2", "<= 1"]),
    (
        ["optimizer.schedule.warmup_fraction=0.6", "optimizer.schedule.decay_fraction=0.5"],
        ["optimizer.schedule.decay_fraction=0.5", "warmup_fraction=0.6", "overlap"],
    ),
    (["logger=wandb", "logger.mode=offlin"], ["logger.mode=offlin", "offline, online or disabled"]),
    (["logger=wandb", "logger.tags=a"], ["logger.tags=a", "a list"]),
    (["logger=wandb", "logger.project=a/b"], ["logger.project=a/b", "128 characters"]),
    (["attention.schedule=local"], ["attention.schedule=local", "a list of at least one"]),
    (["attention.backend=null"], ["attention.backend=null", "reference"]),
    (["model.sink_logits=maybe"], ["model.sink_logits=maybe", "true or false"]),
    (["model.rope_factor=4"], ["model.rope_factor=4", "rope_scaling=none"]),
    (["model.norm_epsilon=nan"], ["model.norm_epsilon=nan", "a finite number > 0"]),
    (["evaluation.long_document=a"], ["evaluation.long_document=a", "an integer >= 1"]),
    (["evaluation.baselines=7"], ["evaluation.baselines=7", "true or false"]),
    (["evaluation.protocol.window=a"], ["evaluation.protocol.window=a", "an integer >= 1 or null"]),
    (["evaluation.protocol.window=2000000"], ["evaluation.protocol.window=2000000", "model.max_length=1048576"]),
    (["evaluation.by_context.contexts=512"], ["evaluation.by_context.contexts=512", "a list"]),
    (
        ["evaluation.by_context.contexts=[2000000]"],
        ["evaluation.by_context.contexts=[2000000]", "model.max_length=1048576"],
    ),
    (["evaluation.key_tokens.evaluator=nowhere"], ["evaluation.key_tokens.evaluator=nowhere", "run folder"]),
    (["evaluation.key_tokens.gain=null"], ["evaluation.key_tokens.gain=null", "> 0"]),
    (["name=null"], ["name=null", "a text"]),
    (["name=..", "outputs=x"], ["name='..'", "letters"]),
    (["outputs=5"], ["outputs=5", "a text"]),
    (["seed=-1"], ["seed=-1", ">= 0"]),
    (["preflight=false"], ["preflight=false", "warn, refuse or off"]),
    (["resume=5"], ["resume=5", "a text that is not empty or null"]),
    (["init_from=[a]"], ["init_from=[a]", "a text that is not empty or null"]),
    (["init_from=/no/such/run"], ["/no/such/run", "run folder"]),
    (["resume=/"], ["/", "not a run folder"]),
    (["+sede=3"], ["sede=3", "seed"]),
]


@pytest.mark.parametrize(("overrides", "named"), WRONG, ids=lambda value: " ".join(value))
def test_a_wrong_setting_is_one_line_with_key_value_and_what_is_accepted(overrides, named):
    with pytest.raises(ValueError) as error:
        check(compose(*overrides))
    line = str(error.value)
    assert "\n" not in line
    for words in named:
        assert words in line


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    from configs.build import ConfigError, build_model_config

    with pytest.raises(ConfigError, match=r"model\.vocabulary=100: must be at least 257\b"):
        build_model_config(compose("model.vocabulary=100")["model"], tokenizer_vocabulary=257)


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"^data\.path=.*: must hold files"):
        check(compose("data=files", f"data.path={tmp_path / 'empty'}"))


def test_several_paths_of_documents(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("text")
    check(compose("data=files", f"data.path=[{tmp_path}/books/,{tmp_path}/*/*.txt]"))
    with pytest.raises(CorpusError, match=rf"^data\.path={tmp_path}/\*\.rst: must "):
        check(compose("data=files", f"data.path=[{tmp_path}/books/,{tmp_path}/*.rst]"))


def test_a_run_may_end_by_its_seconds_alone():
    check(compose("trainer.max_steps=null", "trainer.max_seconds=7.5"))


def test_a_phase_that_begins_after_the_end_of_the_run_is_a_warning(caplog):
    lengths = "phases=[{step: 0, data.sequence_length: 1024}, {step: 9, data.sequence_length: 4096}]"
    check(compose(lengths, "trainer.max_steps=10"))
    assert not caplog.text
    check(compose(lengths, "trainer.max_steps=9"))
    assert "phases[1].step=9" in caplog.text and "trainer.max_steps=9" in caplog.text


def test_the_default_config_passes():
    config = compose()
    check(config)
    assert config["data"]["sequence_length"] >= 4096


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["attention=routed", "attention.backend=flex"],
            r"backend=flex: must be .*patterns\.routed",
        ),
        (["attention=hierarchical", "attention.backend=flex"], r"backend=flex: must be .*\.hierarchy"),
        (["attention=native_sparse", "attention.backend=hopper"], r"backend=hopper: must be .*native_sparse"),
        (["attention.backend=flex", "attention.block=64"], "attention.block=64: must be 128"),
        (["attention.backend=hopper", "attention.block=64"], "attention.block=64: must be 128"),
        (["attention.backend=flash"], r"attention\.backend=flash: must be"),
    ],
)
def test_what_a_backend_cannot_train_is_refused_where_there_is_a_gpu(overrides, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match=message):
        config = compose("trainer=gpu", *overrides)
        check_backend(config, build_plan(config["attention"]))


@pytest.mark.parametrize(("overrides", "ranks"), [((), 2), (("trainer.context_parallel=2",), 1)])
def test_the_data_has_the_number_of_ranks_that_take_different_sequences(overrides, ranks):
    assert check_data(compose("trainer=cpu", "trainer.devices=2", *overrides)).ranks == ranks

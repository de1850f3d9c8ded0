"""Checks the groups of a training config whose types are right: conditions on several keys and on this machine.

One function for each group. The first setting that fails is a ConfigError: one line with the key, the value, and the
accepted values.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from configs import schema
from configs.build import build_data, build_model, build_model_config, build_plan, build_protocol, build_task
from configs.errors import ConfigError, refused
from configs.fp8 import check_fp8
from configs.graphed_step import check_cuda_graph
from configs.paths import checkpoint_of
from configs.phases import build_phases, phase_configs
from configs.pretrained import is_pretrained, weights_of
from configs.runs import check_sizes
from configs.trust import TARGET
from data import DataModule
from data.tokenizers import Saved
from kernels.dispatch import BACKENDS, GPU_BACKENDS
from kernels.patterns import Hierarchical, NativeSparse
from model import AttentionPlan, Transformer
from model.attention import WITH_FAMILY, family_of, shard_unit
from model.precision import SHARDED, devices_of

if TYPE_CHECKING:
    from model.training.phases import Phase


@dataclass(frozen=True)
class Checked:
    """The objects of a training config that its checks have built: a run uses these and builds no others.

    data: not set up yet.
    phases: none where the run has one phase only.
    """

    plan: AttentionPlan
    data: DataModule
    phases: "list[Phase]"


def check_groups(config: Mapping[str, Any], settings: schema.Train) -> Checked:
    """Checks all groups of a composed training config and returns the objects that this builds.

    settings: the config with the types of schema.py.
    """
    check_model(settings.model)
    plan = build_plan(config["attention"])
    check_attention(config, plan)
    phases = build_phases(config, plan)
    data = check_data(config, phases)
    check_trainer(settings.trainer)
    check_fp8(settings)
    check_cuda_graph(config)
    check_backend(config, plan)
    for each, phase in zip(phase_configs(config), phases or [None], strict=True):
        check_context_parallel(each, phase.plan if phase else plan)
    check_optimizer(settings.optimizer)
    check_indexers(config, plan)
    check_freeze(config, plan)
    check_evaluation(config["evaluation"], config["data"]["sequence_length"], config["model"]["max_length"])
    check_start(config)
    check_pretrained(config, plan, data)
    return Checked(plan, data, phases)


def check_model(model: schema.Model) -> None:
    """Checks that the sizes fit each other (ModelConfig), and that a factor of RoPE has a scaling that applies it."""
    build_model_config(model.model_dump(), tokenizer_vocabulary=1)
    if model.rope_scaling == "none" and model.rope_factor != 1:
        raise refused("model.rope_factor", model.rope_factor, "1 with model.rope_scaling=none, which applies no factor")


def check_attention(config: Mapping[str, Any], plan: AttentionPlan) -> None:
    """Checks that each layer of the model can attend with its pattern of the schedule."""
    model = config["model"]
    for layer in range(model["layers"]):
        try:
            pattern = plan.pattern(layer, model["kv_heads"])
        except ValueError as error:
            raise ConfigError(f"attention.{error}") from None
        try:
            family_of(pattern)
        except ValueError:
            name = plan.entry(layer)
            target = config["attention"]["patterns"][name][TARGET]
            raise refused(f"attention.patterns.{name}.{TARGET}", target, WITH_FAMILY) from None


def check_data(config: Mapping[str, Any], phases: "Sequence[Phase]" = ()) -> DataModule:
    """Checks the length of the sequences, and the source without reading documents. Returns the data module, which
    gives the sequences of each phase."""
    length, limit = config["data"]["sequence_length"], config["model"]["max_length"]
    if length > limit:
        raise refused("data.sequence_length", length, f"at most model.max_length={limit}")
    data = build_data(config["data"])
    data.ranks = max(1, devices_of(config["trainer"]) // config["trainer"]["context_parallel"])
    if len({phase.sequence_length for phase in phases}) > 1:
        if data.source.streaming:
            raise refused("data.source.streaming", True, "false where phases change data.sequence_length")
        data.lengths = [(phase.step, phase.sequence_length) for phase in phases]
    return data


def check_trainer(trainer: schema.Trainer) -> None:
    """Checks that the run has an end, and that this machine and Lightning have its devices."""
    if trainer.max_steps is None and trainer.max_seconds is None:
        raise refused("trainer.max_steps", None, "an integer >= 1, or null with trainer.max_seconds=...")
    check_device(trainer.accelerator, trainer.precision, "trainer.")
    check_devices(trainer)


def check_device(accelerator: str, precision: str, prefix: str = "") -> None:
    """Checks that this machine has the device, and that the device has the precision.

    prefix: the group of the two keys, with its dot.
    """
    present = ("cpu", "auto", *(["cuda", "gpu"] if torch.cuda.is_available() else []))
    if accelerator not in present:
        lacks = "" if torch.cuda.is_available() else ", which has no CUDA GPU"
        raise refused(f"{prefix}accelerator", accelerator, f"{' or '.join(present)} on this machine{lacks}")
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if precision == "16-mixed" and not on_gpu:
        raise ConfigError(f"{prefix}precision=16-mixed: must be 32-true, 64-true, bf16-mixed or bf16-true on a CPU")
    if precision.startswith("bf16") and on_gpu and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name()
        raise ConfigError(
            f"{prefix}precision={precision}: must be 16-mixed or 32-true on {name}, which has no bfloat16"
        )


def check_devices(trainer: schema.Trainer) -> None:
    """Checks the number of devices, and that Lightning has the strategy for them."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from model.training.fit import quieten_lightning
    from model.training.strategies import SUPERSEDED, build_strategy

    if trainer.strategy in SUPERSEDED:
        raise refused("trainer.strategy", trainer.strategy, f"{SHARDED}, which trainer=fsdp sets, or ddp, or auto")
    devices = list(trainer.devices) if isinstance(trainer.devices, tuple) else trainer.devices
    if torch.cuda.is_available() and trainer.accelerator != "cpu":
        present = torch.cuda.device_count()
        listed = isinstance(devices, list) and (len(set(devices)) < len(devices) or max(devices) >= present)
        if listed or (isinstance(devices, int) and devices > present):
            accepted = f"at most {present}, or a list of different numbers below {present}, as many GPUs as there are"
            raise refused("trainer.devices", devices, accepted)
    elif devices == -1 or isinstance(devices, list):
        raise refused("trainer.devices", devices, "auto or a number of processes on a CPU")
    elif isinstance(devices, int) and devices > (os.cpu_count() or 1):
        raise refused("trainer.devices", devices, f"at most {os.cpu_count()}: this machine has so many CPU cores")
    given = {"accelerator": trainer.accelerator, "devices": devices, "strategy": trainer.strategy}
    strategy = build_strategy(trainer.strategy)
    without = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quieten_lightning()
    try:
        Trainer(**given | {"strategy": strategy}, precision=trainer.precision, **dict.fromkeys(without, False))
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        settings = " ".join(f"trainer.{key}={value}" for key, value in given.items())
        raise ConfigError(f"{settings}: Lightning refuses them: {str(error).splitlines()[0]}") from None


def check_backend(config: Mapping[str, Any], plan: AttentionPlan) -> None:
    """Checks that an attention backend that is chosen by name can run on the chosen device."""
    on_gpu = torch.cuda.is_available() and config["trainer"]["accelerator"] != "cpu"
    backend, block = config["attention"]["backend"], config["attention"]["block"]
    if backend in GPU_BACKENDS and not on_gpu:
        raise ConfigError(f"attention.backend={backend}: must be auto, reference or blocked on a CPU")
    if backend in ("hopper", "flex"):
        if block != 128:
            raise refused("attention.block", block, f"128 with attention.backend={backend}")
        for name, pattern in plan.patterns.items():
            if not pattern.is_mask and not (backend == "hopper" and isinstance(pattern, Hierarchical)):
                raise ConfigError(
                    f"attention.backend={backend}: must be auto, triton, reference or blocked with "
                    f"attention.patterns.{name}, which is not a mask over tokens"
                )
    if backend == "flash":
        raise ConfigError(
            f"attention.backend=flash: must be auto, {', '.join(name for name in BACKENDS if name != 'flash')}, since "
            "training packs documents and flash takes none"
        )


def check_context_parallel(config: Mapping[str, Any], plan: AttentionPlan) -> None:
    """Checks that devices, lengths, patterns and backend allow context parallelism."""
    trainer, ranks = config["trainer"], config["trainer"]["context_parallel"]
    if ranks == 1:
        return
    devices = devices_of(trainer)
    if devices % ranks:
        raise refused("trainer.context_parallel", ranks, f"a divisor of the number of devices, {devices}")
    if trainer["strategy"] not in ("auto", "ddp", SHARDED):
        accepted = f"auto, ddp or {SHARDED} with trainer.context_parallel={ranks}"
        raise refused("trainer.strategy", trainer["strategy"], accepted)
    backend, accepted = config["attention"]["backend"], ("auto", "triton", "blocked", "reference")
    if backend not in accepted:
        accepted = f"one of {', '.join(accepted)} with trainer.context_parallel={ranks}"
        raise refused("attention.backend", backend, accepted)
    if config["model"]["rope_scaling"] == "dynamic":
        accepted = f"another one with trainer.context_parallel={ranks}: it needs the length of whole documents"
        raise refused("model.rope_scaling", "dynamic", accepted)
    layers, kv_heads = range(config["model"]["layers"]), config["model"]["kv_heads"]
    patterns = [plan.pattern(layer, kv_heads) for layer in layers]
    length = config["data"]["sequence_length"]
    try:
        unit = ranks * shard_unit(patterns, plan.block, length)
    except ValueError as error:
        raise ConfigError(f"trainer.context_parallel={ranks}: {error}") from None
    if length % unit:
        accepted = f"a multiple of {unit} tokens with trainer.context_parallel={ranks} and these patterns"
        raise refused("data.sequence_length", length, accepted)


def check_optimizer(optimizer: schema.AdamW) -> None:
    """Checks that warm-up and decay do not overlap."""
    schedule = optimizer.schedule
    if isinstance(schedule, schema.WarmupStableDecay) and schedule.warmup_fraction + schedule.decay_fraction > 1:
        accepted = f"at most 1 - optimizer.schedule.warmup_fraction={schedule.warmup_fraction}: the two overlap"
        raise refused("optimizer.schedule.decay_fraction", schedule.decay_fraction, accepted)


def check_indexers(config: Mapping[str, Any], plan: AttentionPlan) -> None:
    """Checks the stage in which only the indexers train: the model has some, and the run is longer."""
    layers, steps = range(config["model"]["layers"]), config["trainer"]["max_steps"]
    names = {plan.entry(layer) for layer in layers if plan.training_settings(layer) is not None}
    alone = {name: plan.training[name].indexer_warmup for name in names if plan.training[name].indexer_warmup_alone}
    for name, warmup in alone.items():
        key = f"attention.patterns.{name}.indexer_warmup"
        if plan.patterns[name].router != "indexer" or isinstance(plan.patterns[name], NativeSparse):
            accepted = (
                f"false: it needs attention.patterns.{name}.router=indexer in a pattern as that of attention=routed"
            )
            raise refused(f"{key}_alone", True, accepted)
        if steps is not None and warmup >= steps:
            raise refused(key, warmup, f"below trainer.max_steps={steps} with indexer_warmup_alone=true")
        if warmup != max(alone.values()):
            raise refused(key, warmup, f"{max(alone.values())}, as that of the other indexers that first train alone")


def check_freeze(config: Mapping[str, Any], plan: AttentionPlan) -> None:
    """Checks that each entry of optimizer.freeze matches parameters of the model, and that some are left to train."""
    patterns = config["optimizer"]["freeze"]
    if not patterns:
        return
    from model.training.freezing import IndexersFirst, freeze_parameters
    from model.training.optimizer import split_parameters

    with torch.device("meta"):
        model = build_model(config, 1, plan)
    try:
        freeze_parameters(model, patterns)
    except ValueError as error:
        accepted = "names of the model's parameters, and leave some of them to train"
        raise ConfigError(f"{refused('optimizer.freeze', patterns, accepted)}: {error}") from None
    if model.indexers_alone and not IndexersFirst(model).indexers:
        raise refused("optimizer.freeze", patterns, "names of no indexers with indexer_warmup_alone=true")
    hidden, *_ = split_parameters(model)
    if config["optimizer"]["name"] == "muon" and not hidden:
        raise refused("optimizer.freeze", patterns, "fewer names with optimizer=muon, which trains hidden matrices")


def check_evaluation(evaluation: Mapping[str, Any], sequence_length: int, max_length: int) -> None:
    """Checks that the windows fit each other and the model, and that the evaluator of key tokens exists."""
    protocol = build_protocol(evaluation["protocol"], sequence_length)
    by_context = evaluation["by_context"]
    if protocol.name != "whole" and protocol.window > max_length:
        raise refused("evaluation.protocol.window", protocol.window, f"at most model.max_length={max_length}")
    longest = max((each for each in by_context["contexts"] or () if each != "whole"), default=0)
    if by_context["contexts"] and longest + by_context["targets"] > max_length:
        key, value = "evaluation.by_context.contexts", by_context["contexts"]
        raise refused(key, value, f"with targets={by_context['targets']} at most model.max_length={max_length}")
    if evaluation["key_tokens"]["evaluator"]:
        checkpoint_of("evaluation.key_tokens.evaluator", evaluation["key_tokens"]["evaluator"])


def check_recall(recall: Mapping[str, Any]) -> None:
    """Checks the tasks: that each is a function, and its arguments."""
    if not any(recall["tasks"].values()):
        raise refused("recall.tasks", recall["tasks"], "a mapping with at least one task that is not null")
    for name, entry in recall["tasks"].items():
        if entry is not None:
            build_task(f"recall.tasks.{name}", entry)


def check_start(config: Mapping[str, Any]) -> None:
    """Checks that the run of `init_from` has the sizes of the model."""
    start = config["init_from"]
    if start and not is_pretrained(start):
        check_sizes(start, build_model_config(config["model"], tokenizer_vocabulary=1))


def check_pretrained(config: Mapping[str, Any], plan: AttentionPlan, data: DataModule) -> None:
    """Checks that the weights of `init_from=hf:...` fit the model, and the tokenizer its embedding. Opens headers."""
    start, vocabulary = config["init_from"], config["model"]["vocabulary"]
    if not is_pretrained(start):
        return
    if isinstance(data.tokenizer, Saved) and data.tokenizer.vocabulary > vocabulary:
        accepted = f"at least {data.tokenizer.vocabulary}, as many as {config['data']['tokenizer']['path']} has tokens"
        raise refused("model.vocabulary", vocabulary, accepted)
    with torch.device("meta"):
        model = Transformer(build_model_config(config["model"], tokenizer_vocabulary=1), plan)
    weights_of(start).check(model)

"""The types and ranges of every setting; the YAML files own the defaults and describe what each key does.

A class is a group of configs/ or the config of a command. Checks of several keys together are in checks.py.

This file imports no other package of the repository, so that a wrong value is refused before PyTorch is imported. The
names that a key accepts are therefore written here; a test compares them with those that the packages implement.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from configs.validation import STRICT

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay of a moving average; with 1 it would never change."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""The range of NumPy's seeds."""
Split = Literal["train", "validation", "test"]
Accelerator = Literal["auto", "cpu", "cuda", "gpu"]
Precision = Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"]
PrecisionOrAuto = Literal["auto", "32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"]


Trust = Text | tuple[Text, ...] | None
"""configs/trust.py reads the key and removes it."""


class Settings(BaseModel):
    model_config = STRICT


class Target(Settings):
    """A class by its import path, and its arguments, which validation.check_arguments compares with its signature."""

    model_config = ConfigDict(extra="allow")
    target: Text = Field(alias="_target_")


# The groups


class Attention(Settings):
    name: Text
    patterns: Annotated[dict[str, Target | None], Field(min_length=1)]
    schedule: Annotated[tuple[Text | Annotated[tuple[Text, ...], Field(min_length=1)], ...], Field(min_length=1)]
    block: Literal[16, 32, 64, 128]
    backend: Literal["auto", "reference", "blocked", "triton", "hopper", "flex", "flash"]


class Model(Settings):
    name: Text
    width: Count
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    mlp_width: Count
    vocabulary: Count | None
    max_length: Count
    rope_theta: Positive
    rope_scaling: Literal["none", "linear", "ntk", "dynamic", "llama3", "yarn", "yarn_hf"]
    rope_factor: Annotated[float, Field(ge=1)]
    rope_original_length: Count
    rope_beta_fast: Positive
    rope_beta_slow: Positive
    rope_attention_factor: Positive | None
    rope_truncate: bool
    tie_embeddings: bool
    sink_logits: bool
    norm_epsilon: Positive
    qk_norm: bool
    qkv_bias: bool
    activation_checkpointing: bool | Literal["selective"]
    z_loss: NotNegative


class Data(Settings):
    target: Text = Field(alias="_target_")
    source: Target
    path: Text | tuple[Text, ...] | None
    tokenizer: Target
    packing: Literal["contiguous", "whole", "best_fit"]
    document_mask: bool
    length_weights: dict[Count, Count] | None
    sequence_length: Count
    batch_size: Count
    validation_sequences: Count | None
    minimum_tokens: CountOrZero
    on_bad_document: Literal["error", "skip", "replace"]
    workers: CountOrZero
    cache: Text
    seed: Seed


class Cosine(Settings):
    name: Literal["cosine"]
    warmup_fraction: Fraction
    final_fraction: Fraction


class WarmupStableDecay(Settings):
    name: Literal["warmup_stable_decay"]
    warmup_fraction: Fraction
    decay_fraction: Fraction
    final_fraction: Fraction


class Constant(Settings):
    name: Literal["constant"]
    warmup_fraction: Fraction


class AdamW(Settings):
    name: Literal["adamw"]
    learning_rate: Positive
    weight_decay: NotNegative
    betas: tuple[Decay, Decay]
    epsilon: Positive
    indexer_learning_rate: Positive | None
    freeze: tuple[Text, ...]
    schedule: Annotated[Cosine | WarmupStableDecay | Constant, Field(discriminator="name")]


class Muon(AdamW):
    name: Literal["muon"]
    momentum: Decay


Optimizer = Annotated[AdamW | Muon, Field(discriminator="name")]


class Trainer(Settings):
    max_steps: Count | None
    max_seconds: Positive | None
    accumulate: Count
    gradient_clip: Positive | None
    validate_every: Count | None
    save_every: Count | None
    log_every: Count
    precision: Precision
    accelerator: Accelerator
    devices: Literal["auto", -1] | Count | Annotated[tuple[CountOrZero, ...], Field(min_length=1)]
    strategy: Text
    nodes: Count
    context_parallel: Count
    rank_timeout: Positive
    on_nan: Literal["stop", "skip_step"]
    max_skipped_steps: CountOrZero
    compile: bool
    fp8: Literal[False, "mlp", "mlp_and_head"]
    cuda_graph: bool | Literal["auto"]
    profile: Count | None


class NoLogger(Settings):
    name: Literal["csv"]


class WandbLogger(Settings):
    name: Literal["wandb"]
    mode: Literal["offline", "online", "disabled"]
    project: Annotated[
        str, Field(pattern=r"^[^/\\#?%:]{1,128}$", description=r"1 to 128 characters, none of / \ # ? % :")
    ]
    group: Text | None
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64, description="a text of 1 to 64 characters")], ...]


Logger = Annotated[NoLogger | WandbLogger, Field(discriminator="name")]


class Protocol(Settings):
    name: Literal["whole", "sliding", "chunked"]
    window: Count | None
    stride: Count | None


class ByContext(Settings):
    contexts: tuple[Count | Literal["whole"], ...] | None
    targets: Count
    places: Count
    least_tokens: Count | None


class KeyTokens(Settings):
    evaluator: Text | None
    short_context: Count
    gain: Positive
    confidence: Annotated[float, Field(le=0)]


class Evaluation(Settings):
    split: Split
    limit: Literal["auto"] | Count | None
    tokens_at_once: Count
    long_document: Count
    baselines: bool
    protocol: Protocol
    by_context: ByContext
    key_tokens: KeyTokens


Counts = Annotated[tuple[Count, ...], Field(min_length=1)]


class Recall(Settings):
    lengths: Counts | None
    samples: Count
    tokens_at_once: Count
    depths: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    distances: Counts | None
    tasks: dict[str, Target | None]


class Series(Settings):
    horizons: Counts | None
    context: Count | None
    stride: Count
    samples: Count
    period: Count
    sequences_at_once: Count


class Phase(Settings):
    """Its other keys are settings of other groups, which phases.py checks."""

    model_config = ConfigDict(extra="allow")
    step: CountOrZero


Phases = Annotated[tuple[Phase, ...], Field(min_length=1)] | None


# The commands


class Train(Settings):
    name: Text
    outputs: Text
    seed: Seed
    preflight: Literal["warn", "refuse", "off"]
    phases: Phases
    resume: Text | None
    init_from: Text | None
    trust: Trust = ()
    attention: Attention
    data: Data
    evaluation: Evaluation
    logger: Logger
    model: Model
    optimizer: Optimizer
    trainer: Trainer


class Preflight(Train):
    output: Text | None


class Device(Settings):
    """The device and precision of a trained model."""

    accelerator: Accelerator
    precision: Precision
    trust: Trust = ()
    seed: Seed


class Evaluate(Device):
    precision: PrecisionOrAuto
    suite: Literal["perplexity", "recall"]
    checkpoint: Text | Annotated[tuple[Text, ...], Field(min_length=1)]
    output: Text | None
    evaluation: Evaluation
    recall: Recall
    series: Series
    attention: Attention | None = None
    data: Data | None = None


class Probe(Device):
    checkpoint: Text
    output: Text | None
    attention: Attention
    data: Data | None = None
    split: Split
    length: Count | None
    tokens: Count
    tokens_at_once: Count
    per_head: bool
    measure: Literal["octaves", "all"]
    tolerance: NotNegative
    queries: Count


Prompt = Annotated[
    str, Field(description="a text (quotes make a text of a number or of a word like true: 'prompt=\"5\"')")
]


class Generate(Device):
    checkpoint: Text
    prompt: Prompt | Annotated[tuple[Prompt, ...], Field(min_length=1)]
    prompt_file: Text | None
    new_tokens: Count
    temperature: NotNegative
    top_k: Count | None
    top_p: Annotated[float, Field(gt=0, le=1)]
    stop: Text | tuple[Text, ...] | None
    prefill_chunk: Count
    cuda_graph: Literal["auto"] | bool


class Export(Settings):
    checkpoint: Text
    format: Literal["hf"]
    output: Text
    dtype: Literal["float32", "bfloat16"]
    trust: Trust = ()


class ShowPattern(Settings):
    attention: Attention
    length: Count
    all: bool
    layers: Count
    reach_length: Count
    zoom: Count
    output: Text


class Search(Settings):
    trials: Count
    at_once: Count
    minimize: Text | None
    seed: Seed


class FirstStage(Settings):
    sequence_length: Count
    tokens: Positive
    learning_rate: Positive | None
    init_from: Text | None


class Sweep(Settings):
    name: Annotated[str, Field(pattern=r"^[\w+-][\w.+-]*$", description="a folder's name of letters, digits, _ - . +")]
    baseline: Text | None
    match: Literal["tokens", "time", "flops"] | None
    tokens: Positive | None
    seconds: Positive | None
    flops: Positive | Annotated[list[Positive], Field(min_length=3)] | None
    retry_failed: bool
    isolate: bool
    first_stage: FirstStage | None
    control: Count | None
    search: Search | None
    vary: Annotated[dict[str, object], Field(min_length=1)]

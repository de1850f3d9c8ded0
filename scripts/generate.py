"""Generates text with a trained run, and prints each token when it is sampled.

    python scripts/generate.py checkpoint=outputs/window/2026-01-31_12-00-00_000000 'prompt="import "'
    python scripts/generate.py checkpoint=RUN_DIR prompt_file=beginning.txt temperature=0 new_tokens=1000
    python scripts/generate.py checkpoint=RUN_DIR 'prompt=["One","Two"]' 'stop=["\\n\\n"]'

Standard output gets the text alone; speed and memory go to standard error.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
import re
import time
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from model import Cache

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="../configs", config_name="generate")
def main(config: DictConfig) -> None:
    from configs.trust import trust_named
    from scripts.console import user_errors

    with user_errors():
        write(trust_named(OmegaConf.to_container(config, resolve=True, throw_on_missing=True)))


def write(config: dict[str, Any]) -> list[str]:
    """Continues every prompt and prints it; returns the continuations."""
    from configs.checks import check_generate

    check_generate(config)
    from configs.errors import ConfigError
    from configs.runs import open_run
    from data.tokenizers import Bins
    from model import Cache, Sampling, generate
    from model.decoding.streaming import TextStream
    from model.precision import autocast

    prompts, stop = _prompts(config), _stop(config)
    run = open_run(config["checkpoint"], config["accelerator"], config["precision"])
    model, tokenizer = run.model, run.tokenizer
    if isinstance(tokenizer, Bins):
        raise ConfigError(
            f"checkpoint={config['checkpoint']}: must be a run on text, not on series of numbers;"
            " scripts/evaluate.py forecasts series"
        )
    streams = [TextStream(tokenizer.decode, stop) for _ in prompts]
    alone = len(prompts) == 1  # several texts would mix on the screen: they are printed when they are finished

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def on_token(sequence: int, token: int) -> bool:
        times.append(time.perf_counter())
        text = streams[sequence].add(token)
        if alone:
            show(text)
        # bos begins the next document, and so ends this one.
        return streams[sequence].ended or token == tokenizer.bos

    try:
        sampling = Sampling(**{key: config[key] for key in ("temperature", "top_k", "top_p", "seed")})
        cache = Cache(model, len(prompts))
        cuda_graph = _cuda_graph(config["cuda_graph"], cache)
        beginnings = [[tokenizer.bos, *map(int, tokenizer.encode(prompt))] for prompt in prompts]
        if alone:
            show(prompts[0])
        times = [time.perf_counter()]
        with autocast(model, config["precision"]):
            found = generate(
                model,
                beginnings,
                new_tokens=config["new_tokens"],
                sampling=sampling,
                prefill_chunk=config["prefill_chunk"],
                on_token=on_token,
                cache=cache,
                cuda_graph=cuda_graph,
                vocabulary=tokenizer.vocabulary,
            )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for prompt, stream in zip(prompts, streams, strict=True):
        rest = stream.flush()
        show(f"{rest}\n" if alone else f"{prompt}{stream.text}\n\n")
    _log(cache, times, sum(map(len, found)), len(prompts))
    return [stream.text for stream in streams]


def _prompts(config: dict[str, Any]) -> list[str]:
    from configs.errors import ConfigError

    if config["prompt_file"]:
        if config["prompt"]:
            raise ConfigError(f"prompt_file={config['prompt_file']}: prompt must then be empty")
        file = Path(config["prompt_file"])
        if not file.is_file():
            raise ConfigError(f"prompt_file={file}: no such file")
        try:
            return [file.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"prompt_file={file}: must be text in UTF-8 ({error.reason} at byte {error.start})"
            ) from None
    return config["prompt"] if isinstance(config["prompt"], list) else [config["prompt"]]


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
"""Characters behind a backslash in `stop`, and what they stand for. Hydra's quotes leave backslashes as they are."""


def _stop(config: dict[str, Any]) -> list[str]:
    from configs.errors import ConfigError, as_override

    def character(match: re.Match) -> str:
        if match[1] not in ESCAPES:
            known = ", ".join(f"\\{name}" for name in ESCAPES)
            raise ConfigError(
                f"stop={as_override(config['stop'])}: must have no escapes but {known}, and has {match[0]}"
            )
        return ESCAPES[match[1]]

    given = config["stop"]
    stop = [] if given is None else given if isinstance(given, list) else [given]
    return [re.sub(r"\\(.|$)", character, text, flags=re.DOTALL) for text in stop]


def _cuda_graph(wanted: "bool | str", cache: "Cache") -> bool:
    """Returns whether to replay decoding steps from a CUDA graph. Logs the choice of "auto"."""
    if isinstance(wanted, bool):
        return wanted
    if cache.model.embed_tokens.weight.device.type != "cuda":
        return False
    refused = cache.without("takes_fixed_steps")
    log.info("cuda_graph: %s", f"false, {refused} has no step of fixed shapes" if refused else "true")
    return refused is None


def _log(cache: "Cache", times: list[float], tokens: int, batch: int) -> None:
    """Logs the speed, and the bytes that the cache stores and that a token reads, measured and expected."""
    from model.decoding import expected_bytes

    prefill, decode = times[1] - times[0], times[-1] - times[1]
    speed = f", {(tokens - batch) / decode:,.0f} tokens/s" if tokens > batch and decode > 0 else ""
    length = max(cache.lengths)
    (stored, _), (_, read) = (
        expected_bytes(cache.model, context, cache.batch, cache.bytes_a_number) for context in (length, length - 1)
    )
    log.info(
        "first token after %.2f s%s; cache: %s stored, %s read a token (expected: %s and %s)",
        *(prefill, speed, _megabytes(cache.bytes_stored), _megabytes(cache.bytes_read)),
        *(_megabytes(stored), _megabytes(read)),
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


if __name__ == "__main__":
    from scripts.console import run

    run(main)

"""What lm-evaluation-harness is told, against our own scoring; and the harness itself, where it is installed."""

import json

import numpy as np
import pytest
import torch

from data.tokenizers import Bytes
from kernels.patterns import Dense, Routed, Window
from model import Sampling, Transformer, generate
from model.evaluation import Protocol, token_losses
from scripts.lm_harness import Requests, encode_pair, rolling_segments
from tests.model.small import config, lively, plan
from tests.scripts.runs import make_run, write_books

ROUTED = Routed(
    **dict(window=5, block=16, top_k=1, router="indexer", share="group", first_block=True),
    indexer_dim=4,
)
TEXTS = ["one two, one two", "the river under the quiet stone, and the light of seven nights over it", "x"]


def requests(pattern=None, tokens_at_once: int = 64, truncate: bool = False, **changes) -> Requests:
    sizes = dict(vocabulary=320, max_length=400) | changes
    model = lively(Transformer(config(**sizes), plan(pattern or Window(9, 2))).double()).eval()
    return Requests(model, Bytes(), tokens_at_once, truncate)


class Texts:
    def __init__(self, *texts: str) -> None:
        self.documents = [np.array([Bytes().bos, *Bytes().encode(text)]) for text in texts]

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, document: int) -> np.ndarray:
        return self.documents[document]


@pytest.mark.parametrize("tokens_at_once", [1, 64, 1000])
@pytest.mark.parametrize("pattern", [Window(9, 2), Dense(), ROUTED], ids=["window", "dense", "routed"])
def test_a_continuation_has_the_loss_of_its_own_tokens(pattern, tokens_at_once):
    asked = requests(pattern, tokens_at_once)
    pairs = [(text[:cut], text[cut:]) for text in TEXTS for cut in (0, len(text) // 2, len(text) - 1)]
    found = asked.loglikelihood(pairs)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        (losses,) = token_losses(
            asked.model, Texts(context + continuation), Protocol("whole", None, None), tokens_at_once=999
        )
        scored = losses[len(context.rstrip()) :]  # a byte is a token; spaces go with the continuation
        assert value == pytest.approx(-scored.sum(), abs=1e-6)
    assert asked.loglikelihood([("one", "")]) == [(0.0, True)]


def test_greedy_is_what_generation_gives():
    asked = requests(Dense())
    prompt = [Bytes().bos, *map(int, Bytes().encode("the river"))]
    greedy = Sampling(temperature=0, top_k=None, top_p=1, seed=0)
    vocabulary = Bytes().vocabulary
    ascii_only = 128  # so that what is generated is a text, and encodes to its own tokens
    (tokens,) = generate(asked.model, [prompt], new_tokens=4, sampling=greedy, prefill_chunk=9, vocabulary=ascii_only)
    asked.tokenizer = type("Ascii", (Bytes,), {"vocabulary": ascii_only})()
    text = bytes(tokens).decode()
    assert vocabulary > ascii_only and len(text) == 4
    other = text[:-1] + ("a" if text[-1] != "a" else "b")
    assert [exact for _, exact in asked.loglikelihood([("the river", text), ("the river", other)])] == [True, False]
    assert asked.generate_until([("the river", {"max_gen_toks": 4})]) == [text]
    assert asked.generate_until([("the river", {"max_gen_toks": 4, "until": [text[2]]})]) == [
        text[: text.index(text[2])]
    ]


@pytest.mark.parametrize("tokens_at_once", [16, 1000])
def test_a_whole_text_has_the_loss_of_all_its_tokens(tokens_at_once):
    asked = requests(ROUTED, tokens_at_once)
    losses = token_losses(asked.model, Texts(*TEXTS), Protocol("whole", None, None), tokens_at_once=999)
    found = asked.loglikelihood_rolling([*TEXTS, ""])
    assert found == pytest.approx([*(-loss.sum() for loss in losses), 0.0], abs=1e-6)


def test_windows_roll_as_the_harness_says():
    """Its own example: 10 tokens behind bos, a model of 4."""
    document = ["bos", *range(10)]
    read = [(document[s.start : s.stop], document[s.scored : s.stop + 1]) for s in rolling_segments(11, 4)]
    assert read == [
        (["bos", 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]
    for tokens in range(1, 40):
        scored = [i for s in rolling_segments(tokens, 7) for i in range(s.scored, s.stop + 1)]
        assert scored == list(range(1, tokens))


def test_spaces_at_the_end_of_a_context_belong_to_what_follows():
    encode = lambda text: list(text.encode())  # noqa: E731
    assert encode_pair(encode, "a b  ", "c") == (list(b"a b"), list(b"  c"))
    assert encode_pair(encode, "", "c") == ([], list(b"c"))


def test_what_is_too_long_is_refused_or_cut_at_its_beginning():
    text = TEXTS[1]
    with pytest.raises(
        ValueError, match=r"a request of 72 tokens: the model takes 40 \(model.max_length\); truncate=True"
    ):
        requests(max_length=40).loglikelihood([(text, " a")])
    asked = requests(max_length=40, truncate=True)
    ((cut, _),) = asked.loglikelihood([(text, " a")])
    tokens = torch.tensor([[Bytes().bos, *Bytes().encode(text + " a")]])[:, -41:]
    with torch.no_grad():
        hidden = asked.model(tokens[:, :-1], torch.arange(40)[None], asked.model.build_layouts(None, 40))
        expected = asked.model.logits(hidden)[0, -2:].log_softmax(-1).gather(1, tokens[0, -2:, None]).sum()
    assert cut == pytest.approx(float(expected), abs=1e-6)
    assert len(asked.generate_until([(text, {"max_gen_toks": 5})])) == 1
    with pytest.raises(ValueError, match="a request of"):
        asked.generate_until([(text, {"max_gen_toks": 60})])
    with pytest.raises(ValueError, match=r"num_beams=4: generation takes until, max_gen_toks"):
        asked.generate_until([("a", {"num_beams": 4})])


def test_the_harness_itself_runs_a_task(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the optional extra lm-eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from scripts.lm_harness import register

    register()
    run = make_run(tmp_path, write_books(tmp_path / "books"), name="window")
    documents = [{"question": "the river", "answer": answer, "label": 0} for answer in ("stone", "light", "wind")]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    shared = dict(
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        test_split="test",
        doc_to_text="{{question}}",
    )
    tasks = {
        "pick": dict(output_type="multiple_choice", doc_to_choice=["stone", "wind"], doc_to_target="label"),
        "write": dict(
            **dict(output_type="generate_until", doc_to_target="{{answer}}"),
            generation_kwargs={"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        ),
        "read": dict(output_type="loglikelihood_rolling", doc_to_target="{{question}} {{answer}}"),
    }
    metrics = {"pick": "acc", "write": "exact_match", "read": "word_perplexity"}
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, settings in tasks.items():
        task = {"task": name, **shared, **settings, "metric_list": [{"metric": metrics[name]}]}
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    found = lm_eval.simple_evaluate(
        model="farsight",
        model_args=f"checkpoint={run},accelerator=cpu",
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert 0 <= found["results"]["pick"]["acc,none"] <= 1 and found["results"]["read"]["word_perplexity,none"] > 1

"""Which classes a config may name. An attack leaves a trace if its code runs; none may."""

import sys
from typing import Any

import pytest

from configs.build import build_data, build_plan, build_task
from configs.errors import ConfigError
from configs.trust import trust, trust_named
from data import CorpusError
from kernels.patterns import Window
from tests.commands import compose
from tests.configs.attacks import ATTACKS, MODULE, PATTERN, Traps, put, trusting_itself


@pytest.fixture
def traps(tmp_path, monkeypatch) -> Traps:
    return Traps(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return compose()


def build(config: dict[str, Any]) -> None:
    build_plan(config["attention"])
    build_data(config["data"])


@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_config_names_does_not_run(name, config, traps):
    attacked = ATTACKS[name](config, traps)
    with pytest.raises(ConfigError) as error:
        build(attacked)
    traps.check()
    key = name.partition(":")[0]
    assert str(error.value).startswith(key) and "\n" not in str(error.value)


def test_a_config_cannot_trust_itself(config, traps):
    with pytest.raises(ConfigError, match=f"{PATTERN}._target_={MODULE}.MyPattern: .*trust={MODULE}.MyPattern"):
        build(trusting_itself(config, traps))
    traps.check()


@pytest.mark.parametrize(
    ("key", "target", "settings"),
    [
        ("data.source", "kernels.patterns.Dense", {}),
        ("data.source", "data.tokenizers.Bytes", {}),
        ("data.source", "data.sources.Source", {}),
        ("data.tokenizer", "data.sources.Files", {"text_column": "text"}),
        (PATTERN, "data.sources.Files", {"text_column": "text"}),
        (PATTERN, "kernels.BlockLayout", {}),
    ],
)
def test_a_class_of_ours_of_another_kind_is_refused(key, target, settings, config, traps):
    attacked = put(key, lambda traps: {"_target_": target, **settings})(config, traps)
    with pytest.raises(ConfigError, match=f"{key}._target_={target}: must be"):
        build(attacked)


def test_a_class_that_the_command_line_trusts_is_called(config, traps):
    attacked = ATTACKS[f"{PATTERN}: an import"](config, traps)
    trust(f"{MODULE}.MyPattern")
    pattern = build_plan(attacked["attention"]).patterns["local"]
    assert isinstance(pattern, Window) and type(pattern).__name__ == "MyPattern" and traps.ran.is_dir()


def test_trust_in_a_class_does_not_change_its_kind(config, traps):
    attacked = ATTACKS["data.source: torch.load"](config, traps)
    trust(["torch.load", f"{MODULE}.MyPattern"])
    with pytest.raises(ConfigError, match=r"data.source._target_=torch.load: must be a subclass of data.*Source"):
        build(attacked)
    traps.check()


def test_a_class_of_the_users_own_config_is_trusted_without_asking(config, traps):
    own = ATTACKS[f"{PATTERN}: an import"](config, traps)
    assert "trust" not in trust_named(own)
    assert type(build_plan(own["attention"]).patterns["local"]).__name__ == "MyPattern"


@pytest.mark.parametrize("names", [5, True, "Window", ["a.b", 3], {"a": "b.c"}])
def test_trust_takes_import_paths(names):
    with pytest.raises(ConfigError, match=r"trust=.*: must be the import path of a class"):
        trust(names)


@pytest.mark.parametrize(
    "target", ["os.system", "data.recall.text.np.load", "data.recall.text.Material", f"{MODULE}.MyPattern", None, 5]
)
def test_a_recall_task_is_one_of_ours(target, traps):
    with pytest.raises(ConfigError, match=r"recall.tasks.mine._target_=.*: must be a function like"):
        build_task("recall.tasks.mine", {"_target_": target, "command": f"mkdir {traps.ran}"})
    traps.check()


def own_task(material, length, generator, *, size: int) -> None: ...


def test_a_recall_task_of_the_users_own(traps):
    name = f"{__name__}.own_task"
    trust(name)
    assert build_task("recall.tasks.mine", {"_target_": name, "size": 3}).keywords == {"size": 3}
    with pytest.raises(ConfigError, match=r"recall\.tasks\.mine\.size=a: must be an integer"):
        build_task("recall.tasks.mine", {"_target_": name, "size": "a"})


def test_the_reader_of_pickles_of_datasets_is_no_source(config):
    source = {"_target_": "data.sources.Hub", "config": None, "split": None, "revision": None, "text_column": "text"}
    with pytest.raises(CorpusError, match=r"data\.path=pandas"):
        build_data(config["data"] | {"source": source, "path": "pandas"})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import nothing_here", "to import it raised ModuleNotFoundError: No module named 'nothing_here'"),
        ("x = (", "to import it raised SyntaxError: '(' was never closed (own_patterns.py, line 1)"),
        ("x = 1", "own_patterns has no Own"),
        (
            "import dataclasses\nfrom kernels.patterns import Dense\n@dataclasses.dataclass\nclass Own(Dense): pass",
            "to import it raised TypeError: cannot inherit non-frozen dataclass from a frozen one",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_the_reason(body, reason, config, tmp_path, monkeypatch):
    (tmp_path / "own_patterns.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_patterns", raising=False)
    attacked = put(PATTERN, lambda traps: {"_target_": "own_patterns.Own"})(config, None)
    trust("own_patterns.Own")
    with pytest.raises(ConfigError) as error:
        build_plan(attacked["attention"])
    assert str(error.value).startswith(f"{PATTERN}._target_=own_patterns.Own: must be a class that exists: ")
    assert str(error.value).endswith(reason)

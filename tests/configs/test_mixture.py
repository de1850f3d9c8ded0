"""Entries of data.source.sources: short ones take the rest from the file of configs/data that they name."""

import pytest

from configs.build import build_data
from configs.errors import ConfigError
from configs.mixture import build_source, choice_of, with_whole_sources
from data import Code, Files
from tests.commands import ROOT, compose, resolved


def data(*sources: str) -> dict:
    return compose("data=mixture", f"data.source.sources=[{','.join(sources)}]")["data"]


def test_a_short_entry_is_the_sources_own_config_with_changes():
    group = data(
        f"{{data:books,path:{ROOT}/docs,weight:2,name:pages,source:{{extensions:[.md]}}}}",
        "{data:code,weight:0.5}",
    )
    pages, code = with_whole_sources(group)["source"]["sources"]
    books = compose("data=books", "data.path=x", "data.source.extensions=[.md]")["data"]["source"]
    assert pages == {"name": "pages", "weight": 2, "path": f"{ROOT}/docs", "source": books}
    assert code == {"name": "code", "weight": 0.5, "path": None, "source": compose("data=code")["data"]["source"]}
    mixture = build_source(group)
    assert mixture.weights == {"pages": 4, "code": 1}
    assert [type(mixed.source) for mixed in mixture.sources] == [Files, Code]
    whole = with_whole_sources(group)
    assert with_whole_sources(whole) == whole
    assert build_data(whole).source.weights == mixture.weights


def test_a_change_within_a_group_of_settings_keeps_the_others():
    group = data("{data:code,weight:1}", "{data:recall,weight:1,source:{tasks:{copy:null,needles:{values:[1]}}}}")
    tasks = with_whole_sources(group)["source"]["sources"][1]["source"]["tasks"]
    default = compose("data=recall")["data"]["source"]["tasks"]
    assert tasks == default | {"copy": None, "needles": default["needles"] | {"values": [1]}}
    assert set(build_source(group).generating["recall"].tasks) == set(default) - {"copy"}


@pytest.mark.parametrize(
    ("choice", "changes"), [("books", ("data.path=x",)), ("recall", ()), ("retrieval", ("data.source.targets=all",))]
)
def test_the_choice_of_a_source_is_the_most_similar_one(choice, changes):
    assert choice_of(compose(f"data={choice}", *changes)["data"]["source"]) == choice
    assert choice_of({"_target_": "my_package.MySource"}) is None


def test_a_run_stores_whole_entries():
    sources = resolved("data=mixture")["data"]["source"]["sources"]
    assert [entry["source"]["_target_"] for entry in sources] == ["data.sources.StandardLibrary", "data.sources.Code"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), r"^data\.source\.sources=\[\]: must be a list of at least one"),
        (("{data:code}",), r"^data\.source\.sources\[0\]\.weight: missing; must be "),
        (
            ("{data:code,weight:1}", "{data:hub,weight:0}"),
            r"^data\.source\.sources\[1\]\.weight=0: must be a number > 0",
        ),
        (("code",), r"^data\.source\.sources\[0\]=code: must be a mapping"),
        (("{data:code,weight:1,weights:2}",), r"^data\.source\.sources\[0\]\.weights=2: must be left out"),
        (
            ("{data:codes,weight:1}",),
            r"^data\.source\.sources=\[\{data:codes\}\]: must be .* books, code, files, genome, hub",
        ),
        (("{weight:1}",), r"^data\.source\.sources=.*: must be .* books, code"),
        (("{data:books,weight:1}",), r"^data\.source\.sources: books: must have a path$"),
        (("{data:code,weight:1,source:{dept:2}}",), r"^data\.source\.sources\.code\.dept=2: must be left out"),
        (("{data:code,weight:1}", "{data:code,weight:1}"), r"^data\.source\.sources: must have different names"),
        (
            ("{name:a,weight:1,source:{_target_:os.system}}",),
            r"^data\.source\.sources\.a\._target_=os\.system: must be ",
        ),
    ],
)
def test_a_wrong_entry_is_one_line(sources, message):
    with pytest.raises(ValueError, match=message) as error:
        build_source(data(*sources))
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ConfigError) or "different names" in message

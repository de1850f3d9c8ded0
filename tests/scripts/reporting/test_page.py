"""report.html as a reader meets it: in Chromium, light and dark, on a desk and on a phone.

Screenshots of the page are kept in .cache/screenshots/.
"""

import json
import os

import pytest

from scripts.reporting.write import write_report
from tests.commands import ROOT
from tests.scripts.reporting.chromium import Chromium, find_chromium
from tests.scripts.reporting.sweeps import make_sweep

SCREENSHOTS = ROOT / ".cache" / "screenshots"
REQUIRED = "FARSIGHT_REQUIRE_CHROMIUM"
PHONE, DESK = 375, 1280  # CSS pixels

COLUMN = """(() => {
    const rows = [...document.querySelectorAll("table.sortable tbody tr")];
    const head = [...document.querySelectorAll("table.sortable thead th")];
    const index = head.findIndex((th) => th.innerText.startsWith(%s));
    return {sorted: head[index].getAttribute("aria-sort"), cells: rows.map((row) => row.cells[index].innerText)};
})()"""
PRESS = """[...document.querySelectorAll("table.sortable thead th")]
    .find((th) => th.innerText.startsWith(%s)).querySelector("button").click()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        say = pytest.fail if os.environ.get(REQUIRED) else pytest.skip
        say(f"no chromium here (Debian: apt-get install chromium); where {REQUIRED} is set, that is a failure")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of the page of a sweep that is half-way, with a label that would like to be more than a label."""
    labels = ("dense", "window", "routed",
              "window <img src=https://example.org/x onerror=document.title=1>")  # fmt: skip
    states = {("window", 2): "failed", ("routed", 1): "out of memory", ("routed", 2): "running"}
    folder = make_sweep(tmp_path_factory.mktemp("outputs") / "patterns", labels, (1, 2), states, pictures=True)
    return write_report([folder]).as_uri()


@pytest.mark.parametrize(("width", "dark"), [(DESK, False), (DESK, True), (PHONE, False), (PHONE, True)])
def test_it_renders_in_silence_and_asks_for_nothing(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    browser.screenshot(
        SCREENSHOTS / f"report_{'phone' if width == PHONE else 'desk'}_{'dark' if dark else 'light'}.png"
    )
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:image/png")] == [page]
    assert browser.evaluate("document.title") == "patterns: quality and cost"
    assert browser.evaluate("[...document.images].map((image) => image.naturalWidth > 100)") == [True] * 4
    assert browser.evaluate("document.querySelectorAll('figure svg').length") == 3 + 4 + 2
    inner, content = browser.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert (inner, content) == (width, width), "the page itself never scrolls sideways"
    hidden = """[...document.querySelectorAll("figure svg")].filter((svg) => svg.getBoundingClientRect().width < 150)"""
    assert browser.evaluate(f"{hidden}.length") == 0


def test_dark_is_dark_and_light_is_light_in_text_and_figures(browser, page):
    colors = """(() => {
        const label = [...document.querySelectorAll("figure svg text")].find((text) => text.textContent === "window");
        const found = [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
                       getComputedStyle(label).fill];
        return found.map((color) => color.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3);
    })()"""
    browser.open(page, width=DESK)
    paper, ink, label = browser.evaluate(colors)
    assert paper > 240 and ink < 60 and label < 60
    browser.open(page, width=DESK, dark=True)
    paper, ink, label = browser.evaluate(colors)
    assert paper < 40 and ink > 200 and label > 200


def test_the_table_sorts_by_a_press(browser, page):
    browser.open(page, width=DESK)
    name = json.dumps("step time")
    before = browser.evaluate(COLUMN % name)
    assert before["sorted"] is None and before["cells"][0] and "" in before["cells"], "one row has no number"
    numbers = sorted(float(cell) for cell in before["cells"] if cell)
    for order, expected in (("ascending", numbers), ("descending", numbers[::-1]), ("ascending", numbers)):
        browser.evaluate(PRESS % name)
        found = browser.evaluate(COLUMN % name)
        assert found["sorted"] == order and [float(cell) for cell in found["cells"][:-1]] == expected
        assert found["cells"][-1] == "", "what has no number stays last"
    browser.evaluate(PRESS % json.dumps("pattern"))
    names = browser.evaluate(COLUMN % json.dumps("pattern"))["cells"]
    labels = [name.split(maxsplit=1)[1] for name in names]
    assert labels == sorted(labels) and browser.evaluate(COLUMN % name)["sorted"] is None
    assert browser.complaints() == []


def test_a_table_is_worked_by_keyboard(browser, page):
    browser.open(page, width=DESK)
    browser.evaluate("document.querySelector('table.sortable thead button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    assert browser.evaluate(COLUMN % json.dumps("pattern"))["sorted"] == "ascending"


def test_it_can_be_read_out(browser, page):
    """Chromium's own accessibility tree names every figure, picture, table and button."""
    browser.open(page, width=DESK)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    role = lambda node: node.get("role", {}).get("value")  # noqa: E731
    named = [(role(node), node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    for kind in ("image", "table", "button", "region", "columnheader", "rowheader"):
        names = [name for found, name in named if found == kind]
        assert names and (all(names) or kind == "table"), kind
    assert [name for found, name in named if found == "heading"][:3] == ["patterns", "Findings", "Quality against cost"]

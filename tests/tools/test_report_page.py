"""The report in a real browser: charts, keyboard, narrow windows, dark mode, and no requests.

Needs Chromium (Debian: `apt-get install chromium`; $CHROMIUM names another binary) and `pip install playwright`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import EVIL, copy, hostile, lines, run  # noqa: F401  (fixtures)

from switchkd.tools.report.report import write_report

pytestmark = pytest.mark.slow

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    binary = os.environ.get("CHROMIUM") or next((found for name in BINARIES if (found := shutil.which(name))), None)
    with api.sync_playwright() as started:
        if binary is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium, playwright install chromium, or set $CHROMIUM")
        found = started.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """An open page with the errors and requests that it made."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        # reduced motion: a jump that the page makes has ended when a test reads `scrollY`
        self.page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.resolve().as_uri())

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def picture(self, selector: str) -> Any:
        from PIL import Image

        return Image.open(io.BytesIO(self.page.locator(selector).first.screenshot())).convert("RGB")

    def clean(self) -> bool:
        return not self.errors and len(self.requests) == 1


@pytest.fixture
def open_page(browser) -> Iterator[Any]:
    tabs: list[Tab] = []

    def opened(file: Path, **how: Any) -> Tab:
        tabs.append(Tab(browser, file, **how))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.page.close()


@pytest.fixture(scope="module")
def file(run, tmp_path_factory) -> Path:  # noqa: F811
    return write_report([run], tmp_path_factory.mktemp("page") / "report.html")


def brightness(picture: Any) -> float:
    pixels = list(picture.resize((64, 64)).getdata())
    return sum(sum(pixel) for pixel in pixels) / (3 * len(pixels))


def test_charts_are_drawn(open_page, file, run):  # noqa: F811
    """Each chart is drawn with a visible curve, without errors or requests."""
    tab = open_page(file)
    titles = tab.page.eval_on_selector_all(".chart", "all => all.map(one => one.dataset.title)")
    assert {
        "Loss", "KL on what it trains on", "Agreement with the teacher", "Teacher's share by position",
        "Teacher's share of completions generated together", "Divergence against threshold, by position",
        "Accepted block lengths", "Staleness", "Queue", "Learner waits for rollouts", "Workers wait for the teacher",
        "Workers have nothing to do",
        "From the teacher", "Rollout speed", "Weight version",
    } <= set(titles)  # fmt: skip
    empty = tab.page.eval_on_selector_all(
        ".chart svg[role=img]", "all => all.filter(one => !one.querySelector('path.curve, rect')).length"
    )
    assert empty == 0
    colors = {color for _, color in tab.picture('.chart[data-title="Loss"] svg').getcolors(1 << 20)}
    assert (0x33, 0x69, 0x9C) in colors, "the curve in the first run's colour"
    loss = lines(run / "metrics.jsonl")[-2]["loss/total"]
    assert f"last {loss:.3g}" in tab.page.locator('.chart[data-title="Loss"] svg').first.get_attribute("aria-label")
    assert tab.clean(), (tab.errors, tab.requests)


def test_a_chart_shows_values_by_pointer_and_keys(open_page, file, run):  # noqa: F811
    """A chart's crosshair shows step and value under the pointer and moves with the arrow keys."""
    tab = open_page(file)
    chart = '.chart[data-title="Weight version"]'
    tab.page.locator(f"{chart} svg").first.hover()
    assert "step" in tab.text(f"{chart} .tip")
    tab.page.locator(f"{chart} svg").first.focus()
    tab.page.keyboard.press("Home")
    assert tab.text(f"{chart} .tip").split() == ["step", "1", "1"]
    tab.page.keyboard.press("ArrowRight")
    assert tab.text(f"{chart} .tip").split() == ["step", "2", "2"]
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator(f"{chart} .tip").is_visible()


def test_the_viewer_works_by_keyboard_alone(open_page, file, run):  # noqa: F811
    """The keyboard alone leads from the search field to a token's divergence, threshold, candidates and version."""
    tab, keys = open_page(file), None
    keys = tab.page.keyboard
    rows = [row for row in lines(run / "rollouts.jsonl") if row["origin"] == "rollout"]
    keys.press("/")
    assert tab.page.evaluate("document.activeElement.type") == "search"
    tab.page.locator("[role=listbox]").focus()
    keys.press("End")
    row = rows[-1]
    assert tab.text(".panel h3") == f"Rollout {row['rollout_id']}"
    keys.press("Home")
    row = next(row for row in rows if row["step"] == rows[0]["step"])
    assert tab.text(".panel h3") == f"Rollout {row['rollout_id']}"
    assert tab.page.locator(".panel .tokens").first.text_content().replace("↵", "") == row["completion"]
    keys.press("Enter")
    keys.press("ArrowRight")
    card = tab.text(".card")
    assert card.startswith("2.") and f"version {row['versions'][0][0]}" in card
    assert f"threshold {row['threshold'][1]:.3g}" in card and "divergence" in card
    assert "teacher would write" in card and "student would write" in card and card.count("%") == 4
    keys.press("Home")
    keys.press("t")
    writers = [part["source"] for part in row["segments"] for _ in range(part["num_tokens"])]
    if "teacher" in writers[1:]:
        assert tab.text(".card").startswith(f"{writers.index('teacher', 1) + 1}.") and "by the teacher" in tab.text(
            ".card"
        )
    keys.press("Escape")
    assert tab.page.evaluate("document.activeElement.getAttribute('role')") == "listbox"
    assert not tab.page.locator(".card").is_visible() and tab.clean()


def test_writers_are_marked_without_colour(open_page, file, run):  # noqa: F811
    """Tokens of the teacher have a solid line, those of the data a dotted one, those of the student none."""
    tab = open_page(file)
    tab.page.get_by_label("written as").select_option("")
    style = "one => { const s = getComputedStyle(one); return s.borderBottomStyle + ' ' + s.borderBottomColor }"
    legend = {kind: tab.page.locator(f".legend .tok.{kind}").evaluate(style) for kind in ("student", "teacher", "data")}
    assert legend["student"].endswith("rgba(0, 0, 0, 0)")
    assert legend["teacher"].startswith("solid rgb(") and legend["data"].startswith("dotted rgb(")
    rows = {str(row["rollout_id"]): row for row in lines(run / "rollouts.jsonl")}
    for place in range(tab.page.locator("[role=option]").count()):
        tab.page.locator("[role=option]").nth(place).click()
        row = rows[tab.text(".panel h3").split()[1]]
        writers = [part["source"] for part in row["segments"] for _ in range(part["num_tokens"])]
        drawn = tab.page.eval_on_selector_all(".tokens .tok", "all => all.map(one => one.className.split(' ')[1])")
        assert drawn == writers


def test_the_viewer_filters_rollouts(open_page, file, run):  # noqa: F811
    """The viewer filters by prompt, step and share, and an empty result says so."""
    tab = open_page(file)
    rows = [row for row in lines(run / "rollouts.jsonl") if row["origin"] == "rollout"]

    def shown() -> int:
        return tab.page.locator("[role=option]").count()

    assert shown() == len(rows)
    tab.page.get_by_label("teacher ≥ %").fill("30")
    assert shown() == sum(row["teacher_frac"] >= 0.3 for row in rows)
    tab.page.get_by_label("to step").fill("6")
    assert shown() == sum(row["teacher_frac"] >= 0.3 and row["step"] < 6 for row in rows)
    tab.page.get_by_role("button", name="Clear").click()
    assert shown() == len(lines(run / "rollouts.jsonl"))
    tab.page.get_by_label("prompt or text contains").fill("no such words anywhere")
    assert shown() == 0 and "No rollout fits" in tab.text(".list")
    assert tab.clean()


def test_a_sampled_run_opens_at_its_top(open_page, copy):  # noqa: F811
    """A run of 288 rollouts, of which the page has 200, opens at the top, and no text has a missing value."""
    rows = lines(copy / "rollouts.jsonl")
    many = [{**rows[i * len(rows) // 288], "rollout_id": i, "step": i // 8} for i in range(288)]
    (copy / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    tab = open_page(write_report([copy]))
    assert tab.page.evaluate("document.documentElement.scrollHeight") > 2000
    assert tab.page.evaluate("scrollY") == 0
    generated = tab.page.locator("[role=option]").count()
    assert tab.text("#viewer > .about") == f"{generated} of 200 rollouts on this page, an even sample of the run's 288."
    shown = "[document.body.innerText, ...Array.from(document.querySelectorAll('[aria-label]'), one => one.ariaLabel)]"
    for origin in ("rollout", "dataset", ""):
        tab.page.get_by_label("written as").select_option(origin)
        for key in ("Home", "End"):
            tab.page.locator("[role=listbox]").press(key)
            assert tab.page.locator("[role=option][aria-selected=true]").is_visible()
            tab.page.locator(".tokens .tok").first.click()
            for text in tab.page.evaluate(shown):
                assert not re.search(r"NaN|\bundefined\b|\bnull\b", text), (origin, key, text)
    assert tab.clean(), (tab.errors, tab.requests)


def test_a_choice_scrolls_the_list_only(open_page, copy):  # noqa: F811
    """A choice in the list scrolls the list to the chosen rollout, and leaves the page where it is."""
    rows = lines(copy / "rollouts.jsonl")
    (copy / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    tab = open_page(write_report([copy]))
    place = """() => {
      const view = document.querySelector('[role=listbox]').getBoundingClientRect();
      const box = document.querySelector('[aria-selected=true]').getBoundingClientRect();
      return [scrollY, box.top >= view.top - 1 && box.bottom <= view.bottom + 1] }"""
    tab.page.evaluate("document.querySelector('[role=listbox]').focus({ preventScroll: true })")
    for key in ("End", "ArrowUp", "PageUp", "Home", "PageDown"):
        tab.page.keyboard.press(key)
        assert tab.page.evaluate(place) == [0, True], key


def test_a_narrow_window_fits(open_page, file):
    """In a narrow window nothing is wider than the window, and a token's card is at its lower edge."""
    tab = open_page(file, width=360, height=740)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    tab.page.locator(".tokens .tok").first.click()
    box = tab.page.locator(".card").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and 700 < box["y"] + box["height"] <= 740
    token = tab.page.locator(".tokens .tok").first.bounding_box()
    assert token["y"] + token["height"] <= box["y"], "the card does not lie on the token"


def test_light_and_dark_are_readable(open_page, file):
    """The page is light by default and dark on request, with a contrast of at least 7 in both."""
    light, dark = open_page(file), open_page(file, dark=True)
    assert brightness(light.picture("main")) > 200 and brightness(dark.picture("main")) < 70
    contrast = """kind => {
      const style = getComputedStyle(document.querySelector(kind));
      const linear = v => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      const light = color => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b };
      const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
      return (a + .05) / (b + .05) }"""
    for tab in (light, dark):
        for kind in (".legend .tok.student", ".legend .tok.teacher", ".legend .tok.data"):
            assert tab.page.evaluate(contrast, kind) >= 7, kind


def test_two_runs_share_charts(open_page, run, copy, tmp_path):  # noqa: F811
    """Two runs share each chart in two colours, and the viewer shows the same prompt of both."""
    tab = open_page(write_report([run, copy], tmp_path / "both.html"))
    strokes = tab.page.eval_on_selector_all(
        '.chart[data-title="Loss"] path.curve', "all => all.map(one => getComputedStyle(one).stroke)"
    )
    assert len(strokes) == 2 and len(set(strokes)) == 2
    assert "The same prompt in copy" in tab.text(".panel .others") and tab.page.locator(".tokens").count() == 2
    tab.page.get_by_label("run", exact=True).select_option(label="copy")
    assert "The same prompt in run" in tab.text(".panel .others") and tab.clean()


def test_an_empty_run_has_a_page(open_page, tmp_path):
    """The page of an empty run works without errors."""
    (tmp_path / "config.yaml").touch()
    tab = open_page(write_report([tmp_path]))
    assert "there is nothing to draw over time" in tab.text("#runs")
    assert "No rollouts were recorded" in tab.text(".list")
    assert tab.clean()


def test_markup_is_never_run(open_page, copy, tmp_path):  # noqa: F811
    """Scripts and images in prompts, tokens, stage names and candidates are shown, not run."""
    tab = open_page(write_report([hostile(copy)], tmp_path / "hostile.html"))
    assert "owned" not in tab.page.title() and tab.page.locator("img").count() == 0
    assert EVIL in tab.text(".panel .prompt") and EVIL in tab.page.locator(".tokens").first.text_content()
    tab.page.locator(".tokens .tok").first.click()
    assert "<script>" in tab.text(".card")
    assert tab.clean(), (tab.errors, tab.requests)

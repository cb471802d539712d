"""`switchkd report`: complete runs, damaged runs, and texts with markup."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import STAGES, command, config, save_models

from switchkd.config.errors import ConfigError
from switchkd.tools.report.read import read_run
from switchkd.tools.report.report import write_report
from switchkd.tools.report.rollout_statistics import MAX_POINTS, RolloutStatistics
from switchkd.train import train

EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """STAGES with all records and evaluations."""
    place = save_models(tmp_path_factory.mktemp("models"))
    evaluation = {"data": "./data.jsonl", "num_prompts": 4, "max_new_tokens": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(config(place, STAGES, run={"dir": "run"}, rollout={"save_top_logprobs": 2}, eval=evaluation))
    return place / "run"


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run's files, to be damaged."""
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "summary.json"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(run / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


class Page(HTMLParser):
    """The elements of the page and the data in it, as a browser parses them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.inside: list[str] = []
        self.text = ""
        self.text_of_page = path.read_text(encoding="utf-8")
        self._data = ""
        self.feed(self.text_of_page)
        self.data = json.loads(self._data)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = [tag, dict(attrs).get("id", "")]

    def handle_endtag(self, tag):
        self.inside = []

    def handle_data(self, data):
        if self.inside == ["script", "data"]:
            self._data += data
        elif self.inside[:1] not in (["script"], ["style"]):
            self.text += data

    def tags(self, name: str) -> list[dict]:
        return [attrs for tag, attrs in self.elements if tag == name]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_the_page_has_all_numbers_and_rollouts(run, monkeypatch, capsys):
    """The page has every number of a step and every rollout, and the command prints its path."""
    code, out, _ = command(monkeypatch, capsys, "report", run)
    assert code == 0 and out.strip() == str(run / "report.html")
    page = Page(run / "report.html")
    (shown,) = page.data["runs"]
    rows = lines(run / "metrics.jsonl")
    steps = [row for row in rows if "stage" in row]
    for key in ("loss/total", "loss/kl", "rollout/teacher_token_frac", "replay/staleness_max", "time/wait_teacher_s",
                "replay/waiting", "teacher/output_bytes", "rollout/tokens_per_s", "weight_version"):  # fmt: skip
        assert shown["steps"][key] == [[row["step"], row[key]] for row in steps if key in row], key
    assert shown["evals"]["eval/agreement"] == [[r["step"], r["eval/agreement"]] for r in rows if "eval/agreement" in r]
    assert [stage["name"] for stage in shown["stages"]] == [stage["name"] for stage in STAGES]
    assert [one["pieces"] for one in shown["rollouts"]] == [row["pieces"] for row in lines(run / "rollouts.jsonl")]
    assert not [attrs for attrs in page.tags("ul") if attrs.get("class") == "missing"]
    assert "finished: 10 steps" in page.text and "adaswitch" in page.text


def test_statistics_equal_a_slow_loop(run):
    """Shares, divergences and block lengths by position equal those of a slow loop over rollouts.jsonl."""
    statistics = read_run(run, "run", 10).statistics
    rows = [row for row in lines(run / "rollouts.jsonl") if row["origin"] == "rollout" and row["stage"] == 1]
    shares, statistic, threshold = [], [], []
    for t in range(max(row["num_tokens"] for row in rows)):
        own = [row for row in rows if row["num_tokens"] > t]
        writers = [[p["source"] for p in row["segments"] for _ in range(p["num_tokens"])][t] for row in own]
        shares.append([t, writers.count("teacher") / len(writers)])
        statistic.append([t, sum(row["statistic"][t] for row in own) / len(own)])
        threshold.append([t, sum(row["threshold"][t] for row in own) / len(own)])
    assert statistics.share_by_position()[1] == shares
    for found, wanted in ((statistics.rule_by_position()[1]["statistic"], statistic),
                          (statistics.rule_by_position()[1]["threshold"], threshold)):  # fmt: skip
        assert [t for t, _ in found] == [t for t, _ in wanted]
        assert [v for _, v in found] == pytest.approx([v for _, v in wanted])
    blocks = [n for row in lines(run / "rollouts.jsonl") for n in row["stats"]["block_lengths"]]
    assert dict(map(tuple, statistics.block_lengths())) == pytest.approx(
        {n: blocks.count(n) / len(blocks) for n in blocks}
    )


def test_long_completions_are_binned():
    """Thousands of positions become at most MAX_POINTS bins."""
    num = 4 * MAX_POINTS + 3
    row = {
        "prompt": "p", "step": 0, "stage": 0, "origin": "rollout", "num_tokens": num, "token_ids": [1] * num,
        "segments": [{"source": "student", "num_tokens": 3}, {"source": "teacher", "num_tokens": num - 3}],
        "statistic": [None] * num, "threshold": [None] * num, "stats": {},
    }  # fmt: skip
    statistics = RolloutStatistics()
    assert statistics.add(row)
    points = statistics.share_by_position()[0]
    assert len(points) <= MAX_POINTS and points[0][1] < 1 and points[-1] == [pytest.approx(points[-1][0]), 1]


def test_rollouts_are_taken_from_the_whole_run(run):
    """A limited number of rollouts is taken from the whole run, and the page has the total."""
    found = read_run(run, "run", 7)
    assert len(found.rollouts) == 7 and found.num_rollouts == 40
    steps = [row["step"] for row in found.rollouts]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] >= 8
    assert not read_run(run, "run", 0).rollouts


def test_the_page_loads_nothing(run):
    """No element or style of the page loads anything, and the page's policy forbids it."""
    page = Page(write_report([run]))
    for _, attrs in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attrs.get(name, "#").startswith("#")
    urls = set(re.findall(r"https?://[^\s\"'`]+", page.text_of_page.replace(json.dumps(page.data), "")))
    assert urls <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|document\.write", page.text_of_page)
    (policy,) = [attrs["content"] for attrs in page.tags("meta") if "http-equiv" in attrs]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_two_runs_share_a_page(run, copy, tmp_path, monkeypatch, capsys):
    """Two runs are on one page under distinct names, with the settings that differ."""
    text = (copy / "config.yaml").read_text().replace("seed: 0", "seed: 7", 1)
    (copy / "config.yaml").write_text(text)
    code, _, _ = command(monkeypatch, capsys, "report", run, copy, "--out", tmp_path / "both.html", "--rollouts", 5)
    page = Page(tmp_path / "both.html")
    assert code == 0 and [one["name"] for one in page.data["runs"]] == ["run", "copy"]
    assert all(len(one["rollouts"]) == 5 for one in page.data["runs"])
    assert (
        "settings differ" in page.text
        and "<code>seed</code></th><td><code>0</code></td><td><code>7" in page.text_of_page
    )
    assert len(page.tags("article")) == 2
    again = Page(write_report([run, run], tmp_path / "twice.html"))
    assert len({one["name"] for one in again.data["runs"]}) == 2


# --- damaged runs ----------------------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    """The page of a run without steps says so."""
    (tmp_path / "config.yaml").touch()
    page = Page(write_report([tmp_path]))
    assert "there is nothing to draw over time" in page.text and page.data["runs"][0]["steps"] == {}


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "rollouts.jsonl", "summary.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "noise"])
def test_a_damaged_file_is_named(copy, name, how):
    """A missing, empty or malformed file is named, and the page shows the rest."""
    if how == "gone":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(b"" if how == "empty" else b"\xff\xfe{]\n[1]\n\n")
    page = Page(write_report([copy]))
    assert name in page.text
    if name != "metrics.jsonl":
        assert page.data["runs"][0]["steps"]["loss/total"]
    if name != "rollouts.jsonl":
        assert len(page.data["runs"][0]["rollouts"]) == 40


def test_a_half_written_line_is_left_out(copy):
    """A half-written last line is left out and reported."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (copy / name).write_bytes((copy / name).read_bytes()[:-30])
    (copy / "summary.json").unlink()
    page = Page(write_report([copy]))
    assert page.text.count("is incomplete: it is being written") == 2 and "still going on" in page.text
    assert len(page.data["runs"][0]["rollouts"]) == 39 and "of 10 steps so far" in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"segments": None}, {"segments": [{"source": "x"}]}, {"num_tokens": 10**12}, {"stats": 3}, {"prompt": None},
        {"step": "1"}, {"token_ids": 5}, {"stage": "one"}, {"statistic": 1.0},
    ],
)  # fmt: skip
def test_lines_without_a_rollout_are_counted(copy, change):
    """A line that is an object but no rollout is left out and counted."""
    rows = lines(copy / "rollouts.jsonl")
    rows[20] |= change
    (copy / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report([copy]))
    assert "1 lines of rollouts.jsonl are not rollouts" in page.text
    assert len(page.data["runs"][0]["rollouts"]) == 39


def test_rollouts_without_pieces_are_shown_by_segment(copy):
    """Rollouts without texts of single tokens are shown by segment."""
    rows = [{key: value for key, value in row.items() if key != "pieces"} for row in lines(copy / "rollouts.jsonl")]
    (copy / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report([copy]))
    assert "runs of one writer" in page.text
    assert page.data["runs"][0]["rollouts"][0]["pieces"] == [part["text"] for part in rows[0]["segments"]]


def test_invalid_paths_are_refused(run, tmp_path, monkeypatch, capsys):
    """A missing folder, a file for a folder and an impossible output are refused in one line."""
    for args in (
        (tmp_path / "nowhere",),
        (run / "config.yaml",),
        (run, "--out", tmp_path),
        (run, "--out", "no/r.html"),
    ):
        code, _, err = command(monkeypatch, capsys, "report", *args)
        assert code == 2 and err.count("\n") == 1, args
    with pytest.raises(ConfigError, match="does not exist"):
        write_report([tmp_path / "nowhere"])


# --- markup ----------------------------------------------------------------------------------------------------------


def hostile(copy: Path) -> Path:
    """A run with markup in each of its texts."""
    rows = lines(copy / "rollouts.jsonl")
    for row in rows:
        row["prompt"] = EVIL + row["prompt"]
        row["prompt_id"] = EVIL
        row["finish_reason"] = EVIL
        row["pieces"] = [EVIL, *row["pieces"][1:]]
        row["completion"] = row["segments"][0]["text"] = "<!--<script>" + EVIL
        row["segments"][0]["source"] = "student"
        row["candidates"]["teacher"]["texts"][0] = [EVIL, "\u2028</script"]
    (copy / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{**row, "stage": EVIL} if "stage" in row else row for row in lines(copy / "metrics.jsonl")]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    text = (copy / "config.yaml").read_text().replace("name: warm-up", f'name: "{EVIL}"', 1)
    (copy / "config.yaml").write_text(text)
    return copy


def test_markup_stays_text(run, copy, tmp_path):
    """Markup in texts adds no element to the page, and the texts are complete."""
    plain, page = Page(write_report([run])), Page(write_report([hostile(copy)], tmp_path / "hostile.html"))
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script", "script"]
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    first = page.data["runs"][0]["rollouts"][0]
    assert first["prompt"].startswith(EVIL) and first["pieces"][0] == EVIL
    assert first["candidates"]["teacher"]["texts"][0] == [EVIL, "\u2028</script"]
    assert EVIL in page.text, "the config's stage name, as text"


def test_a_lone_surrogate_is_replaced(copy):
    """A lone surrogate, which JSON allows and UTF-8 does not, becomes a question mark."""
    text = (copy / "rollouts.jsonl").read_text().replace('"prompt": "', '"prompt": "\\ud83d', 1)
    (copy / "rollouts.jsonl").write_text(text)
    (copy / "config.yaml").write_text('run: {dir: "\\ud83d"}\n')
    assert Page(write_report([copy])).data["runs"][0]["rollouts"][0]["prompt"].startswith("?")

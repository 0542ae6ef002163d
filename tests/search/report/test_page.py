"""The page and the plot files, without a browser."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

import secateur
from secateur.envs.core import InputError
from secateur.search.cli import app
from secateur.search.report.data import read_run
from secateur.search.report.front_chart import filled
from secateur.search.report.page import as_json, render
from secateur.search.report.plots import write_plots

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>'


class Elements(HTMLParser):
    """Collects the elements of a page, and the text of its data element."""

    def __init__(self, text):
        super().__init__()
        self.found, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.data += data if self._inside else ""

    def count(self, tag):
        return sum(found == tag for found, _ in self.found)


def rename_budget(run, name):
    """Give the budget `phone` another name in the files, as a stranger could."""
    for file in ("front.json", "study.journal"):
        text = (run / file).read_text()
        (run / file).write_text(text.replace('"phone"', json.dumps(name)))


def test_the_page_is_complete_and_requests_nothing(page):
    elements = Elements(page.read_text())
    assert elements.count("script") == 3
    for tag, attributes in elements.found:
        assert "src" not in attributes and not (tag == "link" and not attributes["href"].startswith("data:")), (tag, attributes)
    assert "@import" not in page.read_text() and "url(" not in re.sub(
        r"<script.*</script>", "", page.read_text(), flags=re.DOTALL
    )
    assert page.stat().st_size < 2_000_000


def test_the_data_in_the_page_are_those_of_the_run(page, data):
    held = json.loads(Elements(page.read_text()).data)
    rows = {row["evaluation"]: row for row in held["front"]["datasets"]["trials"]}
    assert set(rows) == set(data.trials)
    for number, trial in data.trials.items():
        for index, quantity in enumerate(data.quantities):
            assert rows[number][f"q{index}"] == pytest.approx(trial.values[quantity.name] * quantity.factor)
    assert held["layers"][0]["trials"][str(data.winner("phone").number)] == data.levels[data.winner("phone").number]


def test_texts_of_the_files_are_escaped(copy, unchecked):
    rename_budget(copy, HOSTILE)
    text = render([read_run(copy, HOSTILE)])
    elements = Elements(text)
    assert elements.count("script") == 3 and elements.count("img") == 0
    assert HOSTILE not in text and "document.title=" in text  # it is there, as text
    assert HOSTILE in json.loads(elements.data)["front"]["budgets"]


def test_json_in_a_script_cannot_end_it():
    text = as_json({"a": "</script><!--\u2028&"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": "</script><!--\u2028&"}


def test_placeholders_are_replaced_in_one_pass():
    assert filled({"a": ["@x", {"b": "@y"}], "c": 1}, {"@x": "@y", "@y": [1, 2]}) == {"a": ["@y", {"b": [1, 2]}], "c": 1}


def test_every_plot_is_written_as_svg_and_csv(run, other_run, data, tmp_path):
    files = write_plots([data], tmp_path / "one")
    names = {path.stem for path in files}
    assert names == {
        "front-macs", "front-weight_bytes", "anytime", "limits", "steps", "latency", "layers-phone", "layers-watch",
    }  # fmt: skip
    for path in files:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    with (tmp_path / "one" / "front-macs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["evaluation"]) for row in rows) == sorted(data.trials)
    assert {"MACs", "validation top-1 (%)", "status: phone"} <= set(rows[0])
    drawn = (tmp_path / "one" / "front-macs.svg").read_text()
    assert drawn.count('aria-roledescription="point"') >= len(data.trials)
    both = write_plots([data, read_run(other_run, "second")], tmp_path / "two")
    assert {"first-limits.svg", "second-limits.svg", "anytime.svg"} <= {path.name for path in both}


def test_file_names_of_plots_hold_no_path(copy, tmp_path, unchecked):
    rename_budget(copy, "../../evil")
    files = write_plots([read_run(copy, "run")], tmp_path / "plots")
    assert {path.parent for path in files} == {tmp_path / "plots"} and tmp_path / "plots" / "layers-evil.svg" in files


def test_the_command_and_the_function_write_the_same_page(run, tmp_path):
    done = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "a.html"), "--plots", str(tmp_path / "plots")])
    assert done.exit_code == 0 and done.stdout.endswith(f"report: {tmp_path / 'a.html'}\n"), done.output
    assert (tmp_path / "plots" / "anytime.svg").is_file()
    assert secateur.report(run, tmp_path / "b.html") == tmp_path / "b.html"
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def test_a_report_lies_in_the_run_unless_it_is_told_otherwise(copy, other_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert secateur.load_run(copy).report() == copy / "report.html"
    path = secateur.report([copy, other_run])
    text = (tmp_path / path).read_text()
    assert path.name == "report.html" and "Comparison of 2 runs" in text and "copy (evopress), second (random)" in text


@pytest.mark.parametrize("runs", [["missing"], []])
def test_what_is_no_run_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        secateur.report(runs)
    assert list(tmp_path.iterdir()) == []


def test_a_run_named_twice_is_refused(run):
    with pytest.raises(InputError, match="twice"):
        secateur.report([run, run])


def test_an_output_that_cannot_be_written_is_one_sentence(run, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        secateur.report(run, tmp_path / "missing" / "report.html")

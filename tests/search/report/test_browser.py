"""The page in headless Chromium: what is drawn, and what a click does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from secateur.search.report.data import read_run
from secateur.search.report.layers_chart import layer_rows
from secateur.search.report.page import render
from tests.search.report.test_page import HOSTILE, rename_budget

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Chromium and ChromeDriver: apt-get install chromium chromium-driver"
)
SECONDS = 60


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def wait(browser, script, *arguments):
    """Wait until a script returns something true, and return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, SECONDS).until(lambda driver: driver.execute_script(script, *arguments))


def open_page(browser, path):
    browser.get(path.as_uri())
    wait(browser, "return document.documentElement.dataset.drawn")


def errors(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def opened(browser, page):
    open_page(browser, page)
    return browser


POINTS = "return [...document.querySelectorAll('#chart-front path[aria-roledescription=point]')]"


def points(browser):
    """The drawn points of trials: {key: element}."""
    script = POINTS + ".filter((path) => path.__data__?.datum?.key).map((path) => [path.__data__.datum.key, path])"
    return dict(browser.execute_script(script))


def drawn_layers(browser):
    return browser.execute_script("return document.getElementById('chart-layers').view.data('layers')")


def test_every_trial_is_drawn_and_every_plot_has_marks(opened, data):
    assert set(points(opened)) == {f"0/{number}" for number in data.trials}
    for name in ("front", "layers", "anytime", "limits-0", "steps-0", "latency-0"):
        count = opened.execute_script(f"return document.querySelectorAll('#chart-{name} .mark-group path').length")
        assert count > 2, name
    assert errors(opened) == []


def test_a_click_on_a_point_shows_the_layers_of_its_policy(opened, data):
    winner = data.winner("phone").number
    assert {row["layer"]: row["channels"] for row in drawn_layers(opened)} == channels(data, winner)
    other = next(number for number in data.trials if channels(data, number) != channels(data, winner))
    click(opened, f"0/{other}")
    expected = json.loads(json.dumps(layer_rows(data.layers.rows(data.levels[other], []))))
    wait(opened, "return document.getElementById('chosen').value === arguments[0]", f"0/{other}")
    wait(opened, "return document.getElementById('facts').textContent.includes(arguments[0])", f"evaluation{other}")
    wait(
        opened,
        "return document.getElementById('chart-layers').view.data('layers')[0].channels === arguments[0]",
        expected[0]["channels"],
    )
    rows = drawn_layers(opened)
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("layer", "channels", "dense_channels", "weight_bits", "activation_bits"):
            assert row[name] == wanted[name]
        assert row["sensitivity"] == pytest.approx(wanted["sensitivity"], rel=1e-3)


def channels(data, number):
    return {row.layer: row.channels for row in data.layers.rows(data.levels[number], [])}


def send(browser, element, *events):
    """Send mouse events to the middle of an element, also where another one covers it."""
    browser.execute_script(
        "const place = arguments[0].getBoundingClientRect();"
        "const at = {bubbles: true, clientX: place.x + place.width / 2, clientY: place.y + place.height / 2};"
        "for (const name of arguments[1]) arguments[0].dispatchEvent(new MouseEvent(name, at));",
        element,
        list(events),
    )


def click(browser, key):
    send(browser, points(browser)[key], "mousemove", "mousedown", "mouseup", "click")


def test_the_axes_are_those_of_the_select_boxes(opened, data):
    from selenium.webdriver.support.ui import Select

    for box, wanted in (("x", "weight bytes"), ("y", "MACs")):
        Select(opened.find_element("id", box)).select_by_visible_text(wanted)
    script = "return document.getElementById('chart-front').textContent.includes(arguments[0])"
    wait(opened, script, "weight bytes") and wait(opened, script, "MACs")
    wait(opened, "return !document.getElementById('chart-front').textContent.includes('top-1')")
    assert set(points(opened)) == {f"0/{number}" for number in data.trials}


def test_dark_and_phone(browser, page):
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        open_page(browser, page)
        ground, ink = (
            browser.execute_script(f"return getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        )
        assert luminance(ground) < 40 < 200 < luminance(ink)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(color):
    red, green, blue = (int(part) for part in color.partition("(")[2].rstrip(")").split(",")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_a_hostile_budget_name_stays_text(browser, copy, tmp_path, unchecked):
    rename_budget(copy, HOSTILE)
    path = tmp_path / "hostile.html"
    path.write_text(render([read_run(copy, "run")]), encoding="utf-8")
    open_page(browser, path)
    send(browser, next(iter(points(browser).values())), "pointerover", "mouseover", "pointermove", "mousemove")
    wait(browser, "return document.getElementById('vg-tooltip-element')?.textContent.includes('searched for')")
    assert browser.title == "run" and browser.find_elements("css selector", "img") == []
    assert "owned" in browser.find_element("id", "chart-front").text + browser.find_element("id", "budget").text
    assert errors(browser) == []


def test_five_thousand_trials_are_drawn(browser, data, tmp_path):
    known = list(data.trials.values())
    trials = {number: replace(known[number % len(known)], number=number) for number in range(5000)}
    levels = {number: data.levels[known[number % len(known)].number] for number in trials}
    path = tmp_path / "many.html"
    path.write_text(render([replace(data, trials=trials, levels=levels)]), encoding="utf-8")
    assert path.stat().st_size < 8_000_000
    open_page(browser, path)
    assert browser.execute_script(f"{POINTS}.filter((path) => path.__data__?.datum?.key).length") == 5000
    click(browser, "0/4999")
    wait(browser, "return document.getElementById('facts').textContent.includes('evaluation4999')")


def test_several_runs_are_compared(browser, data, other_run, tmp_path):
    path = tmp_path / "two.html"
    path.write_text(render([data, read_run(other_run, "second")]), encoding="utf-8")
    open_page(browser, path)
    runs = {key.partition("/")[0] for key in points(browser)}
    assert runs == {"0", "1"} and errors(browser) == []
    click(browser, next(key for key in points(browser) if key.startswith("1/")))
    wait(browser, "return document.getElementById('facts').textContent.includes('second')")
    assert all(row["sensitivity"] is None for row in drawn_layers(browser))

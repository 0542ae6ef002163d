"""The page of the service in headless Chromium: a search is launched from it, watched, looked at, and fetched."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs Chromium and ChromeDriver: apt-get install chromium chromium-driver"
    ),
]

CONFIG = """
model: {factory: "secateur:synthetic", weights: trained, input: [3, 8, 8]}
data: {name: synthetic, train: 256, calibration: 64, validation: 200, test: 300}
search: {agent: random, evaluations: 8, workers: 0, precision: float32}
recovery: []
budgets: {small: {macs: "<= 50%"}}
finalize: {top: 1, verify: false, recovery: []}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a running server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    store = tmp_path_factory.mktemp("service") / "store"
    command = [sys.executable, "-P", "-m", "secateur", "serve", "--no-token", "--store", str(store), "--port", str(port)]
    with subprocess.Popen(command) as process:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield address
        process.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_window_size(1000, 900)
    yield driver
    driver.quit()


def wait(browser, condition, seconds=120):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(condition)


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def front_path(browser):
    """The resource of the front of the search that is shown."""
    return f"/searches/{browser.current_url.partition('#')[2]}/front"


def write(browser, text):
    """Replace the configuration in the form."""
    area = find(browser, "#config")[0]
    browser.execute_script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", area, text)


def test_a_search_is_launched_watched_looked_at_and_fetched(url, browser):
    browser.get(url)
    write(browser, CONFIG.replace("random", "bees"))
    wait(browser, lambda _: "bees" in find(browser, "#verdict")[0].text)
    assert not find(browser, "#start")[0].is_enabled()
    write(browser, CONFIG)
    wait(browser, lambda _: "can be used" in find(browser, "#verdict")[0].text)
    find(browser, "#start")[0].click()
    wait(browser, lambda _: find(browser, "#state") and "finished" in find(browser, "#state")[0].text)
    assert "8 of 8 evaluations" in find(browser, "#state")[0].text
    dots = wait(browser, lambda _: find(browser, "#front circle"))
    front = browser.execute_script("return fetch('/v1' + arguments[0]).then(answer => answer.json())", front_path(browser))
    assert len(dots) == len(front["points"]) > 0
    on_front = find(browser, "#front circle:not(.off)")
    assert on_front
    number = on_front[0].get_attribute("data-evaluation")
    on_front[0].send_keys("\n")  # by keyboard
    bars = wait(browser, lambda _: find(browser, "#policy .bars > div"))
    assert f"Evaluation {number}" in find(browser, "#policy h2")[0].text
    assert any("% kept" in bar.text for bar in bars)
    names = [link.text for link in wait(browser, lambda _: find(browser, "#files a"))]
    assert "front.json" in names
    assert "evaluations 8 of 8" in find(browser, "#log")[0].text
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "422" not in entry["message"]]
    assert not [entry for entry in severe if "409" not in entry["message"] and "favicon" not in entry["message"]]
    find(browser, "h1 a")[0].click()
    wait(browser, lambda _: "finished" in find(browser, "#list")[0].text)


def test_the_page_fits_a_phone(url, browser):
    browser.set_window_size(390, 800)
    browser.get(url)
    wait(browser, lambda _: find(browser, "#verdict") and find(browser, "#verdict")[0].text)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.set_window_size(1000, 900)

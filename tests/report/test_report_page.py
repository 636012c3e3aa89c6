"""The report's page in a real Chromium: it runs, loads nothing else, fits a phone and is readable in dark mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import CHROMIUM, Browser
from support.ladder_runs import CONFIGS, steps_of, write_run

from ffcv_convnext.report import summarise, to_html

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium not found: bash scripts/setup.sh chromium installs it"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder of two seeds with a stopped, a failed and a missing step, and a name with HTML in it."""
    folder = tmp_path_factory.mktemp("ladder")
    steps = [replace(step, config=step.config.replace(epochs=20, warmup_epochs=1)) for step in steps_of()]
    for number, step in enumerate(steps[:-1]):
        for seed in range(2):
            write_run(
                folder / step.name / f"seed{seed}",
                step,
                seed=seed,
                top1=78 + 0.25 * number + 0.1 * seed,
                epochs=12 if number == 9 else None,
                error="out of memory </script><b>" if number == 9 and seed else None,
            )
    other = replace(steps[0], config=steps[0].config.replace(resnet_layers="1-1-1-1"))
    write_run(folder / "<script>alert(1)<\N{DIVISION SLASH}script>", other)
    path = folder / "ladder.html"
    path.write_text(to_html(summarise([folder], CONFIGS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_the_page_runs_without_errors_and_loads_nothing_else(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('section tbody tr').length") == 15 + 1 + 12
    assert browser.evaluate("document.querySelectorAll('details tbody tr').length") == 28 + 1
    assert browser.evaluate("document.querySelectorAll('#chart path').length") == 28 + 1
    assert "separate downsampling" in browser.evaluate("document.querySelector('#figure svg').textContent")
    text = browser.evaluate("document.body.innerText")
    for words in ("1 stopped 12/20, 1 failed 12/20", "missing", "out of memory </script><b>", "<script>alert(1)"):
        assert words in text
    assert browser.requests == [page.as_uri()]
    assert browser.messages == []


def test_the_browser_reports_requests_and_errors(browser: Browser, page: Path) -> None:
    broken = page.with_name("broken.html")
    image = '<img src="http://127.0.0.1:9/x.png">'
    broken.write_text(page.read_text().replace("</body>", f"{image}<script>undeclared.x</script></body>"))
    browser.open(broken)
    messages = " ".join(browser.messages)
    assert "undeclared is not defined" in messages
    assert "Content Security Policy" in messages


def test_pointing_at_a_curve_shows_its_values_and_controls_select_the_curves(browser: Browser, page: Path) -> None:
    browser.open(page)
    left, top, width = browser.evaluate(
        "(() => { const chart = document.getElementById('chart'); chart.scrollIntoView();"
        " const box = chart.getBoundingClientRect(); return [box.left, box.top, box.width]; })()"
    )
    browser.move_mouse(left + width - 10, top + 2)  # where the best run ends
    assert browser.evaluate("document.getElementById('reading').textContent").endswith("epoch 20: top-1, % 81.35")
    assert browser.evaluate("document.querySelectorAll('#chart path.on').length") == 2, "both seeds of the step"
    browser.evaluate("document.querySelectorAll('#controls button')[1].click()")
    assert browser.evaluate("document.querySelectorAll('#chart path').length") == 27, "one step less"
    browser.evaluate("document.querySelectorAll('#controls button')[0].click()")
    assert "no step is selected" in browser.evaluate("document.getElementById('reading').textContent")
    browser.evaluate("document.querySelectorAll('#controls button')[0].click()")
    browser.evaluate(
        "(() => { const select = document.querySelector('#controls select'); select.value = 'train_loss';"
        " select.dispatchEvent(new Event('change')); })()"
    )
    assert browser.evaluate("document.querySelector('#chart svg').getAttribute('aria-label')") == "training loss"
    assert browser.messages == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_the_page_is_readable_wide_and_narrow_light_and_dark(
    width: int, dark: bool, browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "only tables and figure scroll sideways"
    picture = np.asarray(Image.open(browser.screenshot(tmp_path / "page.png")).convert("L"), dtype=float)
    background = np.median(picture)
    assert background < 40 if dark else background > 240
    bands = np.array_split(np.abs(picture - background), 6)
    assert all((band > 100).mean() > 0.002 for band in bands[:5]), "text from top to bottom"
    colours = browser.evaluate(
        "['h1', '#figure text', '#chart text', 'td'].map(name => getComputedStyle(document.querySelector(name)))"
        ".map(style => [style.color, style.fill])"
    )
    assert len({colour for colour, _ in colours}) == 1, "one text colour"

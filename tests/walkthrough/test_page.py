"""The HTML page in a real browser: every step, its numbers compared with the trace.

Needs Chromium and its driver (Debian: chromium, chromium-driver) and selenium; without them the
tests of the page's behavior are skipped, but not those of the file itself.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Verb
from cli.programs import files_of_at_most
from glassllama.walkthrough.export import html_page, render_page, to_json
from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.steps import STEPS
from glassllama.walkthrough.tracing import Trace, trace
from glassllama.walkthrough.walkthrough import Walkthrough, open_walkthrough
from tiny_families import write_family
from walkthrough.conftest import write_checkpoint

LARGEST = 5_000_000  # bytes, of twelve tokens on the default model
TWELVE_TOKENS = "The capital of France is Paris, and the capital of Japan"
# Would execute code, or end the data, if it were interpreted as markup.
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1><!--{{script}}&lt;"
NO_BROWSER = "the page is tested with chromium, chromedriver and selenium"


@pytest.fixture(scope="module")
def walk(default_model: Path) -> Iterator[Walkthrough]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_walkthrough(default_model, TWELVE_TOKENS, name="smollm2-135m", layer=3, head=4)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def file(walk: Walkthrough, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(html_page(walk, to_json(walk)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recorded(walk: Walkthrough) -> Trace:
    return trace(walk.model, walk.ids)


def hostile_page(with_text: Path, folder: Path) -> Path:
    walk = open_walkthrough(with_text, HOSTILE, name=HOSTILE, layer=1)
    done = [compare_with_mistake(walk, MISTAKES["scale"])]
    path = folder / "hostile.html"
    page = html_page(walk, to_json(walk, layers=[0, 1], mistakes=done))
    path.write_text(page, encoding="utf-8")
    return path


# Like a mouse click: scrolled into view, and only if no other element covers its center.
PRESS = """
const button = document.querySelectorAll(arguments[0])[arguments[1]];
button.scrollIntoView({block: 'nearest', inline: 'nearest'});
const box = button.getBoundingClientRect();
const hit = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
if (!button.contains(hit)) throw new Error(`${arguments[0]} is hidden by ${hit?.outerHTML}`);
button.focus({preventScroll: true});
button.click();
"""


class Browser:
    """Chromium without a window, and the operations that the tests use."""

    def __init__(self) -> None:
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        logs = {"browser": "ALL", "performance": "ALL"}
        options.set_capability("goog:loggingPrefs", logs)
        self.driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def open(self, path: Path, *, width: int = 1200, **media: str) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        features = [{"name": name.replace("_", "-"), "value": v} for name, v in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(path.as_uri())

    def script(self, text: str, *arguments: object) -> Any:
        return self.driver.execute_script(text, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.script("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        """The displayed texts of all matching elements."""
        found = "[...document.querySelectorAll(arguments[0])]"
        return list(self.script(f"return {found}.map((node) => node.innerText)", selector))

    def press(self, selector: str, index: int = 0) -> None:
        """Click a button by script: a third of the processor time of the driver's own click."""
        self.script(PRESS, selector, index)

    def step(self, number: int) -> None:
        self.press(f"[data-step='{number}']")

    def keys(self, element: Any, *names: str) -> None:
        from selenium.webdriver import Keys

        element.send_keys(*[getattr(Keys, name) for name in names])

    def slide(self, name: str, value: float) -> None:
        """Like a user: set the value and send the event."""
        self.script(
            "const input = document.querySelector(`[data-slider='${arguments[0]}']`);"
            "input.value = arguments[1]; input.dispatchEvent(new Event('input'));", name, value,
        )  # fmt: skip

    def shown(self, hook: str) -> tuple[str, float]:
        """The text under a heat map: position and number."""
        value = self.script(
            "return document.querySelector(`[data-map='${arguments[0]}']`)"
            ".closest('.picture').querySelector('.value').textContent", hook,
        )  # fmt: skip
        where, number = value.rsplit(": ", 1)
        return where, float(number)

    def console_errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        return {e["params"]["request"]["url"] for e in sent}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    programs = shutil.which("chromium") and shutil.which("chromedriver")
    if not programs or importlib.util.find_spec("selenium") is None:
        pytest.skip(NO_BROWSER)
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def page(browser: Browser, file: Path) -> Browser:
    browser.console_errors(), browser.requests()  # remove what other tests have stored
    browser.open(file)
    return browser


def test_size_and_content_security_policy_of_the_file(walk: Walkthrough, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(walk.ids) == 12
    assert file.stat().st_size <= LARGEST
    assert set(re.findall(r"https?://[^'\"\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def document_of(file: Path) -> dict[str, Any]:
    """The data in a page; test_to_json.py compares it with the steps."""
    found = re.search('id="document">(.*?)</script>', file.read_text(encoding="utf-8"))
    assert found is not None
    document: dict[str, Any] = json.loads(found[1])
    return document


def test_every_step_by_click(page: Browser, file: Path) -> None:
    steps = document_of(file)["walk"]["steps"]
    assert len(page.all("[data-step]")) == len(steps) == len(STEPS)
    for number, step in enumerate(steps):
        page.one(f"[data-step='{number}']").click()  # of the mouse
        assert page.text("#title") == f"{number}. {step['title']}"
        assert page.text(".question") == step["question"]
        assert page.one("[aria-current=step]").get_attribute("data-step") == str(number)
        shown = page.text("#step")
        for source in step["sources"]:
            assert "\n".join(source["lines"]) in shown
        for check in step["checks"]:
            assert f"✓ {check['what']}" in shown
        assert step["what_if"]["shows"] in shown
        assert all(numbers["name"] in shown for numbers in step["numbers"])
    assert page.console_errors() == []
    assert page.requests() == {file.as_uri()}


HOOKS = [
    (5, "input"), (5, "attention_norm"), (6, "attention.q"), (6, "attention.v"),
    (8, "attention.q_rope"), (9, "attention.scores"), (10, "attention.wo"),
    (11, "feed_forward.gate"), (11, "feed_forward.gated"), (11, "output"), (13, "norm"),
]  # fmt: skip


def test_numbers_equal_the_trace(page: Browser, walk: Walkthrough, recorded: Trace) -> None:
    """Read by keyboard: from the last token four up, and some channels to the right."""
    ends = {"input": "layers.2", "output": "layers.3", "norm": "norm"}
    for step, hook in HOOKS:
        tensor = recorded[ends.get(hook, f"layers.3.{hook}")][0]
        if tensor.ndim == 3:
            tensor = tensor[walk.head if len(tensor) == walk.config.n_heads else walk.kv_head]
        page.step(step)
        canvas = page.one(f"[data-map='{hook}']")
        page.script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        page.keys(canvas, "ARROW_UP", "ARROW_UP", "ARROW_UP", "ARROW_UP")
        for keys, column in (([], 0), (["PAGE_DOWN"], 16), (["ARROW_RIGHT"] * 3, 19)):
            page.keys(canvas, *keys) if keys else None
            column = min(column, tensor.shape[-1] - 1)
            where, value = page.shown(hook)
            assert where.startswith(walk.pieces[7]), hook
            assert value == pytest.approx(float(tensor[7, column]), rel=1e-3, abs=1e-6), hook


def test_attention_of_any_layer_under_the_pointer(
    page: Browser, walk: Walkthrough, recorded: Trace
) -> None:
    from selenium.webdriver import ActionChains

    page.step(9)
    page.slide("layer", 17)
    page.press("[data-focus='head 6']")
    weights, size = recorded["layers.17.attention.weights"][0, 6], len(walk.ids)
    canvas = page.one("[data-map='attention.weights']")
    page.script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width, height = canvas.size["width"] / size, canvas.size["height"] / size
    for row, column in ((0, 0), (9, 4), (11, 0), (11, 11)):
        x, y = (column + 0.5 - size / 2) * width, (row + 0.5 - size / 2) * height
        ActionChains(page.driver).move_to_element_with_offset(canvas, int(x), int(y)).perform()
        where, value = page.shown("attention.weights")
        assert where == f"{walk.pieces[row]} · attends to {walk.pieces[column]}"
        assert value == pytest.approx(float(weights[row, column]), rel=1e-3, abs=1e-6)
    assert len(page.all(".maps canvas")) == walk.config.n_heads


SETTINGS = [(1.0, 0, 1.0), (0.5, 0, 0.9), (2.0, 5, 1.0), (1.7, 40, 0.6)]


def test_sliders_redraw_the_distribution(page: Browser, walk: Walkthrough) -> None:
    """Compared with the whole vocabulary, sorted and filtered here."""
    page.step(14)
    for temperature, k, p in SETTINGS:
        for name, value in (("temperature", temperature), ("top-k", k), ("top-p", p)):
            page.slide(name, value)
        probs = (walk.logits[0, -1].double() / temperature).softmax(-1).sort(descending=True).values
        if k:
            probs = probs[:k] / probs[:k].sum()
        kept = len(probs) if p == 1 else int((probs.cumsum(0) < p).sum()) + 1
        probs = probs[:kept] / probs[:kept].sum()
        numbers = page.texts("#distribution .number")
        assert len(numbers) == 16
        for number, expected in zip(numbers, probs[:16].tolist(), strict=False):
            assert float(number.rstrip("%")) == pytest.approx(100 * expected, abs=0.06)
        assert all(number.startswith("removed") for number in numbers[kept:])
        says = page.text("#kept")
        assert says.startswith(f"{kept} of" if kept <= 256 else "More than")


def test_the_cache_grows(page: Browser, walk: Walkthrough) -> None:
    page.step(15)
    for made in (0, 1, 3):
        page.slide("generated tokens", made)
        assert len(page.all("#step .cell.cached")) == (len(walk.ids) + made - 1 if made else 0)
        assert len(page.all("#step .cell.computed")) == (1 if made else len(walk.ids))


def test_dials_rotate_with_the_position(page: Browser, walk: Walkthrough, recorded: Trace) -> None:
    page.step(8)
    page.slide("position", 5)
    for pair in (0, 7, 31):
        label = page.one(f"[data-dial='{pair}']").get_attribute("aria-label")
        expected = float(walk.model.frequencies[pair]) * 5
        assert float(label.split()[2]) == pytest.approx(expected, rel=1e-3)
    assert "at position 5" in page.text("#pair")
    page.one("[data-dial='7']").click()
    for line, hook in ((1, "q"), (3, "q_rope")):
        numbers = page.all("#pair p")[line].text.split(maxsplit=1)[1].split(", ")
        pair = recorded[f"layers.3.attention.{hook}"][0, walk.head, 5, 14:16]
        assert list(map(float, numbers)) == pytest.approx(pair.tolist(), rel=1e-3)


def test_by_keyboard_alone(page: Browser) -> None:
    body = page.one("body")
    page.keys(body, "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT")
    assert page.text("#title").startswith("2. ")
    assert page.text("[role=status]").startswith("Step 2: ")
    page.keys(body, "TAB")
    assert page.script("return document.activeElement.className") == "skip"
    page.keys(page.driver.switch_to.active_element, "TAB")
    token = page.driver.switch_to.active_element
    assert token.get_attribute("aria-checked") == "true"
    page.keys(token, "ARROW_LEFT")
    assert page.one("[aria-checked=true]").get_attribute("data-focus") == "token 10"
    page.keys(page.driver.switch_to.active_element, "TAB")
    step = page.driver.switch_to.active_element
    assert step.get_attribute("data-step") == "0"
    assert step.value_of_css_property("outline-style") == "solid"
    page.keys(step, "ENTER")
    assert page.text("#title").startswith("0. ")


def test_all_controls_have_accessible_names(page: Browser) -> None:
    """In the accessibility tree of screen readers."""
    wanted = {"button", "slider", "radio", "application", "img", "combobox"}
    for number in range(len(STEPS)):
        page.step(number)
        nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        used = [n for n in nodes if not n["ignored"] and n["role"]["value"].lower() in wanted]
        assert len(used) > len(STEPS)
        assert [n for n in used if not n.get("name", {}).get("value", "").strip()] == []


def test_phone_dark_mode_and_reduced_motion(browser: Browser, file: Path) -> None:
    """360 pixels without horizontal scrolling; other colors in dark mode; no animations."""
    paper = []
    for scheme in ("light", "dark"):
        browser.open(file, width=360, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        for number in range(len(STEPS)):
            browser.step(number)
            assert browser.script("return document.documentElement.scrollWidth") <= 360, number
        browser.step(14)
        assert browser.one(".fill").value_of_css_property("transition-duration") in ("0s", "")
        paper.append(browser.one("body").value_of_css_property("background-color"))
    assert paper[0] != paper[1]
    assert browser.console_errors() == []


CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map((c) => (c /= 255) <= 0.04045 ? c / 12.92
    : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return [...document.querySelectorAll('.tinted, .tinted *')].map((node) => {
  const [text, ground] = [node, node.closest('.tinted')].map((n) => getComputedStyle(n));
  const pair = [light(text.color), light(ground.backgroundColor)].sort((a, b) => a - b);
  return (pair[1] + 0.05) / (pair[0] + 0.05);
});
"""


def test_text_on_colored_tokens_and_cells_has_enough_contrast(browser: Browser, file: Path) -> None:
    """WCAG 2, level AA, for every color and both color schemes."""
    for scheme in ("light", "dark"):
        browser.open(file, prefers_color_scheme=scheme)
        for number in (9, 12):
            browser.step(number)
            for token in (3, 11):
                browser.press("#tokens button", token)
                ratios = browser.script(CONTRAST)
                assert len(ratios) >= 3
                assert min(ratios) >= 4.5, (scheme, number, token)


def test_steps_are_in_the_order_of_their_numbers(browser: Browser, file: Path) -> None:
    for width in (360, 1200):
        browser.open(file, width=width)
        boxes = browser.script(
            "return [...document.querySelectorAll('#map [data-step]')].map((button) =>"
            "  ({step: button.dataset.step, ...button.getBoundingClientRect().toJSON()}))"
        )
        assert [int(box["step"]) for box in boxes] == list(range(len(STEPS)))
        along = "x" if width == 360 else "y"
        assert [box[along] for box in boxes] == sorted(box[along] for box in boxes)


def test_on_a_phone_the_overview_is_one_line_with_the_current_step(
    browser: Browser, file: Path
) -> None:
    browser.open(file, width=390)
    for number in (0, 9, 17):
        browser.step(number)
        assert browser.one("#map").size["height"] <= 60
        box = browser.script(
            "const box = document.querySelector('[aria-current=step]').getBoundingClientRect();"
            "return [box.left, box.right]"
        )
        assert 0 <= box[0] < box[1] <= 390


def test_a_difference_beyond_rounding_is_a_warning(
    browser: Browser, file: Path, tmp_path: Path
) -> None:
    document = document_of(file)
    check = document["walk"]["steps"][9]["checks"][0]
    check["relative"] = 2 * check["allowed"]
    (tmp_path / "warns.html").write_text(render_page(document), encoding="utf-8")
    browser.open(tmp_path / "warns.html")
    browser.step(9)
    assert f"! {check['what']}: differs from the running model" in browser.text(".check.warns")
    assert f"✓ {check['what']}:" not in browser.text("#step")


def test_texts_are_never_interpreted_as_markup(
    browser: Browser, with_text: Path, tmp_path: Path
) -> None:
    path = hostile_page(with_text, tmp_path)
    assert path.read_text(encoding="utf-8").count("</script>") == 2
    browser.console_errors(), browser.requests()
    browser.open(path)
    assert browser.text("#model") == HOSTILE
    for number in range(len(STEPS) + 1):  # the mistake is the last one
        browser.step(number)
        assert browser.all("img, #step script") == []
    assert browser.text("#title").endswith(MISTAKES["scale"].title)
    assert browser.script("return window.hit ?? null") is None
    assert browser.console_errors() == []
    assert browser.requests() == {path.as_uri()}


@pytest.mark.parametrize("ids", [[5], [*range(70)]], ids=["one token", "more than are recorded"])
def test_ids_without_a_vocabulary(browser: Browser, tmp_path: Path, ids: list[int]) -> None:
    path = tmp_path / "ids.html"
    walk = open_walkthrough(write_checkpoint("hf", tmp_path), ids, layer=2)
    path.write_text(html_page(walk, to_json(walk)), encoding="utf-8")
    browser.console_errors()
    browser.open(path)
    for number in range(len(STEPS)):
        browser.step(number)
        browser.press("#tokens button")
    browser.step(9)
    browser.slide("layer", 0)
    assert len(browser.all(".maps canvas")) == (walk.config.n_heads if len(ids) == 1 else 0)
    assert browser.console_errors() == []


def shown_pair(page: Browser, line: int) -> list[float]:
    numbers = page.all("#pair p")[line].text.split(maxsplit=1)[1]
    return [float(number) for number in numbers.split(", ")]


# The chosen layer, and another one that differs from it in RoPE or window, if there is one.
@pytest.mark.parametrize(
    ("name", "layer", "other"),
    [("gemma3", 5, 0), ("smollm3", 3, 0), ("olmo2", 1, None), ("phi3 longrope", 1, None)],
)
def test_other_families_on_a_phone(
    browser: Browser, tmp_path: Path, name: str, layer: int, other: int | None
) -> None:
    """Every step and mistake, without errors or horizontal scrolling; the rotated pair."""
    path, ids = tmp_path / "family.html", [n * 37 % 131 for n in range(13)]
    walk = open_walkthrough(write_family(name, tmp_path, "hf"), ids, layer=layer, head=4, name=name)
    done = [compare_with_mistake(walk, mistake) for mistake in MISTAKES.values()]
    every = to_json(walk, layers=range(walk.config.n_layers), mistakes=done)
    path.write_text(html_page(walk, every), encoding="utf-8")
    browser.console_errors()
    browser.open(path, width=390)
    for number in range(len(STEPS) + len(done)):
        browser.step(number)
        assert browser.script("return document.documentElement.scrollWidth") <= 390, number
    assert browser.console_errors() == []
    browser.step(8)
    if walk.rope is None:
        assert "No positions in this layer" in browser.text("#title")
        assert browser.all("[data-dial]") == []
    else:
        assert len(browser.all("[data-dial]")) == walk.rope.rotary_dim // 2
        half = walk.rope.rotary_dim // 2  # the layout of all four
        rotated = walk.manual["attention.q_rope"]
        for line, tensor in ((1, walk.unrotated), (3, rotated)):
            pair = tensor[0, 4, -1, [0, half]].tolist()
            assert shown_pair(browser, line) == pytest.approx(pair, rel=1e-3, abs=1e-6)
    if name == "gemma3":
        browser.step(9)
        assert "Gray: hidden" not in browser.text("#step")  # the layer has no window
        browser.slide("layer", other or 0)
        assert "the window of 6 tokens" in browser.text("#step")
        browser.press("#tokens button", 12)
        browser.step(8)
        assert "has another RoPE" in browser.text("#step")


def test_the_command_writes_and_opens_the_page(
    verb: Verb, with_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "a page.html", tmp_path / "opened"
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    monkeypatch.setattr(
        webbrowser, "_tryorder", None
    )  # like in a new process: BROWSER is read again
    done = verb(
        "walkthrough", "lambda forms", "-m", with_text, "--html", path, "--open",
        "--layers", "all", "--step", 9, "--no-mask",
    )  # fmt: skip
    assert (done.code, done.out, done.err) == (0, f"{path}\n", "")
    assert opened.read_text().strip() == path.as_uri()
    document = document_of(path)
    assert document["start"] == 9
    assert list(document["walk"]["layers"]) == ["0", "1", "2"]
    assert [done["name"] for done in document["walk"]["mistakes"]] == ["no-mask"]


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--html", "x.html", "--json"], 2, "not together with --json"),
        (["--layers", "0"], 2, "only with --html, --open or --json"),
        (["--html", "x.html", "--layers", "0,3"], 1, "--layers 0,3: expected 'all' or"),
        (["--html", "/nowhere/x.html"], 1, "--html /nowhere/x.html: expected the name of"),
        (["--html", "."], 1, "--html .: expected the name of a file"),
    ],
)
def test_errors_of_the_command(
    verb: Any, with_text: Path, options: list[str], code: int, line: str
) -> None:
    done = verb("walkthrough", "lambda", "-m", with_text, *options)
    assert (done.code, done.out) == (code, "")
    assert line in " ".join(done.err.split())
    assert not Path("x.html").exists()


def test_a_page_that_cannot_be_written_does_not_change_the_old_one(
    verb: Verb, with_text: Path, tmp_path: Path
) -> None:
    page = tmp_path / "walk.html"
    page.write_text("an older one")
    with files_of_at_most(4096):
        ran = verb("walkthrough", "lambda", "-m", with_text, "--html", page)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == f"error: {page}: cannot be written (File too large)"
    assert page.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [page]

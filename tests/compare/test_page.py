"""The comparison's page in a real headless browser: light and dark, desktop and phone."""

import itertools
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.compare.__main__ import main
from tests.support.chromium import chromium
from tests.support.made_up_runs import write_gpu_run, write_run

SPEEDS = {"bf16": 41000, "fp8_baseline": 43800, "fp8_compact": 43900, "fp8_direct": 47800}
CURVES = "#charts .mark-line path"
READ = "document.querySelector('#tools input[type=range]').nextSibling.textContent"
COUNT = "all => all.map((path) => path.getAttribute('d').split('L').length - 1)"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "runs"
    for path, speed in SPEEDS.items():
        write_gpu_run(folder / path, path, speed)
    folders = [str(folder / path) for path in SPEEDS]
    assert main([*folders, "--baseline", "fp8_baseline"]) == 0
    return folder / "compare" / "compare.html"


class Opened:
    """A page, and everything that it complained about or asked a network for."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light", size: str = "desktop"):
        width, height = SIZES[size]
        touch = size == "phone"
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, has_touch=touch
        )
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("#charts[aria-busy=false]")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *error: object) -> None:
        self.context.close()
        assert self.errors == []
        assert len(self.requests) == 1, "the page loads more than itself"


# The contrast, as WCAG 2 defines it, of a colour with what lies behind it: of the text of every
# element that has some of its own and is seen, or of the strokes of the elements of a selector.
CONTRASTS = """(strokes) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const colour = rgba(getComputedStyle(n).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const hasText = (node) => !["SCRIPT", "NOSCRIPT"].includes(node.tagName) && !node.disabled
    && node.checkVisibility()
    && [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const nodes = [...document.querySelectorAll(strokes || "body *")];
  return nodes.filter((node) => strokes || hasText(node)).map((node) => {
    const style = getComputedStyle(node);
    const inSvg = node.namespaceURI.endsWith("svg");
    const ink = strokes ? style.stroke : inSvg ? style.fill : style.color;
    const [a, b] = [light(rgba(ink)), light(behind(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${node.tagName} ${node.textContent.trim().slice(0, 30)}`];
  });
}"""


# Of the curves of a chart, without the width of their strokes, and of the chart.
EXTENTS = """(chart) => {
  const sheet = [...chart.querySelectorAll(".mark-rect path")].at(-1).getBBox();
  return [...chart.querySelectorAll(".mark-line path")].map((curve) => {
    const box = curve.getBBox();
    return [box.x, box.y, box.width, box.height, sheet.width, sheet.height];
  });
}"""
Box = dict[str, float]


def inside(box: Box, frame: Box) -> bool:
    return all(
        box[start] >= frame[start] - 1 and box[start] + box[size] <= frame[start] + frame[size] + 1
        for start, size in (("x", "width"), ("y", "height"))
    )


def apart(one: Box, other: Box) -> bool:
    """Whether neither text lies on the other; lines of text may touch."""
    return (
        one["x"] + one["width"] <= other["x"]
        or other["x"] + other["width"] <= one["x"]
        or one["y"] + one["height"] <= other["y"] + 2
        or other["y"] + other["height"] <= one["y"] + 2
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_can_be_seen(
    browser: Any, page_file: Path, tmp_path: Path, scheme: str, size: str
) -> None:
    with Opened(browser, page_file, scheme, size) as page:
        picture = tmp_path / f"{scheme}-{size}.png"
        page.screenshot(path=str(picture), full_page=True)
        wide, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= room, "the page scrolls sideways"

        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 23, 26)"}[scheme]
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 150
        assert min(contrasts)[0] >= 4.5, min(contrasts)
        curves = page.evaluate(CONTRASTS, CURVES)
        assert len(curves) == 24  # six charts of four runs
        assert min(curves)[0] >= 3, min(curves)

        # Every chart has four curves of as many points as the run has lines, inside the drawing.
        frame = page.query_selector("#charts svg").bounding_box()
        assert frame["width"] <= room
        charts = [page.query_selector(f"#charts .concat_{place}_group") for place in range(6)]
        for chart in charts:
            drawn = chart.query_selector_all(".mark-line path")
            assert [curve.get_attribute("aria-label") for curve in drawn] == list(SPEEDS)
            for curve in drawn:
                assert len(re.findall(r"[ML]", curve.get_attribute("d"))) == 20
            for x, y, width, height, plot_width, plot_height in chart.evaluate(EXTENTS):
                assert plot_width > 290
                assert width == pytest.approx(plot_width, abs=1)
                assert x == pytest.approx(0, abs=1)
                assert y >= -0.1
                assert y + height <= plot_height + 0.1
        # A title, five numbers or more along each axis, its name, and four that are read off.
        texts = [text for text in page.query_selector_all("#charts svg text") if text.inner_html()]
        assert len(texts) > 6 * (1 + 4 + 4 + 1 + 4)
        boxes = [text.bounding_box() for text in texts]
        assert [box for box in boxes if not inside(box, frame)] == []
        for one, other in itertools.combinations(boxes, 2):
            assert apart(one, other), "texts of the charts overlap"

        # The pixels themselves: the curves' colours are there.
        colours = set(Image.open(picture).convert("RGB").getdata())
        blue = {"light": (0, 114, 178), "dark": (86, 180, 233)}[scheme]
        assert blue in colours


def test_a_stranger_finds_the_answer(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        cards = {
            card.query_selector("h3").inner_text(): card.inner_text()
            for card in page.query_selector_all(".card")
        }
        assert list(cards) == ["bf16", "fp8_compact", "fp8_direct"]
        assert "slower" in cards["bf16"]
        assert "inside the noise" in cards["fp8_compact"]
        assert "faster" in cards["fp8_direct"]
        assert all("x the speed of fp8_baseline" in card for card in cards.values())
        first = page.query_selector("#reading li").inner_text()
        assert first.startswith("bf16 was slower than fp8_baseline: ")
        said = page.inner_text("#reading")
        assert re.search(r"relayouts took of a profiled step: bf16 0 of 36\d.\d ms", said)
        assert re.search(r"fp8_baseline 1.4\d of 34\d.\d ms \(0.41\s%\)", said)
        # All of that is seen before the first scroll.
        for card in page.query_selector_all(".card, .whiskers"):
            box = card.bounding_box()
            assert box["y"] + box["height"] < SIZES["desktop"][1]


def test_every_figure_has_its_origin(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        origin = page.query_selector("#origin").inner_text()
        for path in SPEEDS:
            assert str(page_file.parent.parent / path) in origin
        for row in page.query_selector_all("#figures tbody th"):
            assert row.query_selector("small").inner_text()
        links = page.eval_on_selector_all("#origin a", "all => all.map((a) => a.href)")
        assert len(links) == 4 * 4
        for link in links:
            assert Path(link.removeprefix("file://")).exists()


def test_step_parts_are_stacked_to_scale(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        bars = page.query_selector_all("#breakdown .bar")
        assert len(bars) == 4
        widths, totals = [], []
        for bar in bars:
            parts = bar.query_selector_all(".stack i")
            assert len(parts) >= 12
            widths.append(sum(part.bounding_box()["width"] for part in parts))
            totals.append(float(bar.query_selector("b").inner_text().removesuffix(" ms")))
        for width, total in zip(widths, totals, strict=True):
            assert width / max(widths) == pytest.approx(total / max(totals), abs=0.01)
        said = page.query_selector("#breakdown p").inner_text()
        assert f"({', '.join(f'2 of 4 in {path}' for path in SPEEDS)})" in said
        # The relayouts' times can be compared by eye: they are where a bar begins.
        titles = [bar.query_selector(".stack i").get_attribute("title") for bar in bars]
        assert [title.startswith("relayout: 1.4") for title in titles] == [False, True, True, False]
        page.click("#breakdown summary")
        table = page.query_selector("#breakdown table").inner_text()
        assert "up projection" in table
        assert "time/up_projection_ms" in table
        colours = page.eval_on_selector_all(
            "#breakdown .legend .swatch",
            "all => all.map((s) => getComputedStyle(s).backgroundColor)",
        )
        assert len(set(colours)) == len(colours) == 14


def readouts(page: Any, chart: int) -> list[str]:
    """The numbers over a chart."""
    groups = page.query_selector_all("#charts .mark-text.role-mark")
    found = [[t.inner_html() for t in group.query_selector_all("text")] for group in groups]
    return [texts for texts in found if texts not in (["tokens"], ["step"])][chart]


def plot(page: Any) -> Box:
    """Where the curves of the first chart are; scrolled to."""
    sheet = page.query_selector_all("#charts .concat_0_group .mark-rect path")[-1]
    sheet.scroll_into_view_if_needed()
    return sheet.bounding_box()


def tooltip(page: Any) -> tuple[str, dict[str, str]]:
    """Its head, and a value by the name of a run."""
    tip = page.wait_for_selector("#vg-tooltip-element.visible")
    rows = [row.inner_text().split("\t") for row in tip.query_selector_all("tr")]
    values = {name.strip(): value.strip() for name, value in rows}
    return tip.query_selector("h2").inner_text(), values


def logged(page_file: Path, metric: str, place: int) -> Any:
    """What each run logged in a line of its metrics, as it is shown: with four digits behind."""
    folders = [page_file.parent.parent / path for path in SPEEDS]
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[place] for folder in folders]
    return pytest.approx([json.loads(line)[metric] for line in lines], abs=1.01e-4)


def numbers(texts: Iterable[str]) -> list[float]:
    return [float(text.replace(",", "")) for text in texts]


def wait_until(page: Any, condition: str) -> None:
    page.wait_for_function(condition, timeout=10_000)


def test_curves_are_read_by_pointer_and_keyboard(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        # What is read off is the end, until somebody asks.
        assert numbers(readouts(page, 0)) == logged(page_file, "loss/train", -1)
        curve = plot(page)
        middle = curve["x"] + curve["width"] * 9 / 19 + 2  # at the tenth of twenty points
        page.mouse.move(middle - 100, curve["y"] + 60)
        page.mouse.move(middle, curve["y"] + 60)
        wait_until(page, "document.querySelector('#vg-tooltip-element h2')?.innerText[0] === '3'")
        head, values = tooltip(page)
        assert head == "3,200 tokens"
        assert list(values) == list(SPEEDS)
        assert numbers(values.values()) == logged(page_file, "loss/train", 9)
        assert readouts(page, 0) == list(values.values())
        speeds = logged(page_file, "throughput/tokens_per_sec", 9)
        speeds.abs = 0.501
        assert numbers(readouts(page, 2)) == speeds

        page.click("#tools input[value=step]")
        page.focus("#tools input[type=range]")
        page.keyboard.press("ArrowLeft")
        wait_until(page, f"{READ} === '90'")
        assert numbers(readouts(page, 0)) == logged(page_file, "loss/train", 8)


def test_curves_can_be_hidden_and_zoomed(browser: Any, page_file: Path) -> None:
    def points() -> int:
        return page.get_attribute(CURVES, "d").count("L")

    with Opened(browser, page_file) as page:
        hide = "#legend label:has-text('fp8_direct') input"
        page.uncheck(hide)
        wait_until(page, f"document.querySelectorAll('{CURVES}').length === 18")
        assert "fp8_direct" not in page.eval_on_selector_all(
            CURVES, "all => all.map((path) => path.ariaLabel)"
        )
        assert len(readouts(page, 0)) == 3

        box = plot(page)
        whole = points()
        assert whole == 19
        page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 60)
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
        page.mouse.up()
        wait_until(page, f"document.querySelector('{CURVES}').getAttribute('d').length < 150")
        zoomed = points()
        assert 2 <= zoomed < whole / 2
        # All charts show the same part; and they do so when the window has another width.
        assert set(page.eval_on_selector_all(CURVES, COUNT)) == {zoomed}
        page.set_viewport_size({"width": 600, "height": 900})
        wait_until(page, "document.querySelector('#charts svg').clientWidth < 600")
        page.wait_for_selector("#charts[aria-busy=false]")
        assert page.eval_on_selector_all(CURVES, COUNT) == [zoomed] * 18
        assert not page.is_checked(hide)
        assert page.query_selector_all("#legend input")[0].is_checked()

        page.check(hide)
        box = plot(page)
        page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + 100)
        wait_until(page, f"({COUNT})([...document.querySelectorAll('{CURVES}')])[23] === 19")


def test_a_finger_reads_and_does_not_zoom(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, size="phone") as page:
        box = plot(page)
        y = box["y"] + 80
        page.touchscreen.tap(box["x"] + box["width"] * 5 / 19, y)
        wait_until(page, f"{READ} === '60'")
        assert numbers(readouts(page, 0)) == logged(page_file, "loss/train", 5)
        fingers = page.context.new_cdp_session(page)
        for kind, places in (("Start", (5,)), ("Move", (7, 9, 11)), ("End", ())):
            for place in places or (None,):
                x = box["x"] + box["width"] * (place or 0) / 19
                points = [] if place is None else [{"x": x, "y": y}]
                fingers.send(
                    "Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points}
                )
        wait_until(page, f"{READ} === '120'")
        assert numbers(readouts(page, 0)) == logged(page_file, "loss/train", 11)
        assert page.eval_on_selector_all(CURVES, COUNT) == [19] * 24


def test_the_page_may_not_ask_a_network(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(page_file.as_uri())
    answer = "fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'refused')"
    assert page.evaluate(answer) == "refused"
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_on_a_cpu_no_path_is_called_faster(browser: Any, tmp_path: Path) -> None:
    for path, speed in (("bf16", 100.0), ("fp8_direct", 50.0)):
        metrics = {"throughput/tokens_per_sec": speed}
        write_run(tmp_path / path, path, metrics=metrics, device="cpu", device_name="a laptop")
    assert main([str(tmp_path / "bf16"), str(tmp_path / "fp8_direct")]) == 0
    with Opened(browser, tmp_path / "compare" / "compare.html") as page:
        text = page.inner_text("body")
        assert text.count("says nothing about speed on a GPU") == 1
        assert page.query_selector(".card, .whiskers") is None
        assert "faster" not in text
        assert "profiled step" not in text
        assert "slower" not in text
        assert page.query_selector("#breakdown") is None
        assert page.query_selector("#routing") is None


@pytest.mark.parametrize("name", ["x<script><b>&", "a\"'\\b {x} ${y}[0]", "title"])
def test_names_do_not_break_out(browser: Any, tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "a", "bf16").rename(tmp_path / name)
    assert main([str(folder)]) == 0
    with Opened(browser, tmp_path / "compare" / "compare.html") as page:
        assert page.inner_text("#legend label") == name
        assert page.query_selector("#legend b") is None
        box = plot(page)
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 50)
        wait_until(page, "document.querySelector('#vg-tooltip-element h2')?.innerText[0] === '6'")
        assert tooltip(page) == ("6,400 tokens", {name: "3.0000"})
        assert page.query_selector("#vg-tooltip-element b") is None


@pytest.mark.slow
def test_from_two_finished_runs_to_the_page_in_ten_seconds(tmp_path: Path) -> None:
    """With 5,000 logged steps each, which is a long run; imports included."""
    folders = []
    for path in ("fp8_baseline", "fp8_compact"):
        folder = write_gpu_run(tmp_path / path, path, SPEEDS[path])
        lines = (folder / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in lines.splitlines()]
        many = [
            json.dumps(row | {"progress/step": row["progress/step"] + 200 * n}) + "\n"
            for n in range(250)
            for row in rows
        ]
        (folder / "metrics.jsonl").write_text("".join(many))
        folders.append(str(folder))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "scripts.compare", *folders], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of a processor's time: the clock would also count what else this machine does meanwhile.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = (tmp_path / "compare" / "compare.html").stat().st_size
    print(f"{seconds:.1f} s, {size / 1e6:.1f} MB")
    assert seconds < 10

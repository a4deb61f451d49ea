"""The comparison's page in a real headless browser: light and dark, desktop and phone."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.compare.__main__ import main
from tests.support.chromium import chromium
from tests.support.made_up_runs import write_gpu_run, write_run

SPEEDS = {"bf16": 41000, "fp8_baseline": 43800, "fp8_compact": 43900, "fp8_direct": 47800}
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
        self.page.wait_for_selector("#charts path.curve")

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
        curves = page.evaluate(CONTRASTS, "path.curve")
        assert len(curves) == 24  # six charts of four runs
        assert min(curves)[0] >= 3, min(curves)

        # Every chart has four curves of as many points as the run has lines, inside its frame.
        charts = page.query_selector_all("figure.chart")
        assert len(charts) == 6
        for chart in charts:
            frame = chart.query_selector("svg").bounding_box()
            assert frame["width"] > 300
            assert frame["height"] > 150
            drawn = chart.query_selector_all("path.curve")
            assert [curve.get_attribute("data-run") for curve in drawn] == list(SPEEDS)
            for curve in drawn:
                numbers = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", curve.get_attribute("d"))
                assert len(numbers) == 20
                assert all(0 <= float(x) <= frame["width"] for x, _ in numbers)
                assert all(0 <= float(y) <= frame["height"] for _, y in numbers)
        # No text of an axis lies on another.
        for chart in charts:
            boxes = [text.bounding_box() for text in chart.query_selector_all("svg text")]
            for index, one in enumerate(boxes):
                for other in boxes[index + 1 :]:
                    apart = (
                        one["x"] + one["width"] <= other["x"]
                        or other["x"] + other["width"] <= one["x"]
                        or one["y"] + one["height"] <= other["y"] + 2
                        or other["y"] + other["height"] <= one["y"] + 2
                    )
                    assert apart, "labels of an axis overlap"

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


def test_curves_can_be_read_hidden_and_zoomed(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        svg = page.query_selector("figure.chart svg")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60)
        tip = page.query_selector("figure.chart .tip")
        said = tip.inner_text().split("\n")
        assert said[0] == "6,400 tokens"
        shown = dict(zip(said[1::2], said[2::2], strict=True))
        rows = (page_file.parent.parent / "bf16" / "metrics.jsonl").read_text().splitlines()
        loss = float(re.findall(r'"loss/train": ([\d.]+)', rows[-1])[0])
        assert float(shown["bf16"]) == pytest.approx(loss, abs=1e-4)
        assert set(shown) == set(SPEEDS)

        hide = "#legend button:has-text('fp8_direct')"
        page.click(hide)
        assert len(page.query_selector_all("path.curve")) == 18
        assert page.get_attribute(hide, "aria-pressed") == "false"
        page.click(hide)

        whole = page.get_attribute("path.curve", "d").count("L")
        page.mouse.move(box["x"] + 60 + box["width"] * 0.2, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 60 + box["width"] * 0.5, box["y"] + 60)
        page.mouse.up()
        zoomed = page.get_attribute("path.curve", "d").count("L")
        assert 2 <= zoomed < whole / 2
        page.click("#reset")
        assert page.get_attribute("path.curve", "d").count("L") == whole

        page.click("#tools button:has-text('x axis')")
        svg.focus()
        page.keyboard.press("ArrowRight")
        assert tip.inner_text().startswith("step 10")


def test_on_a_cpu_no_path_is_called_faster(browser: Any, tmp_path: Path) -> None:
    for path, speed in (("bf16", 100.0), ("fp8_direct", 50.0)):
        metrics = {"throughput/tokens_per_sec": speed}
        write_run(tmp_path / path, path, metrics=metrics, device="cpu", device_name="a laptop")
    assert main([str(tmp_path / "bf16"), str(tmp_path / "fp8_direct")]) == 0
    with Opened(browser, tmp_path / "compare" / "compare.html") as page:
        text = page.inner_text("body")
        assert "says nothing about GPUs" in text
        assert "faster" not in text
        assert "profiled step" not in text
        assert "slower" not in text
        assert page.query_selector("#breakdown") is None
        assert page.query_selector("#routing") is None


def test_names_do_not_break_out(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x<script><b>&", "bf16", config={"run": {"name": "a"}})
    assert main([str(folder)]) == 0
    with Opened(browser, tmp_path / "compare" / "compare.html") as page:
        assert page.inner_text("#legend button") == "x<script><b>&"
        assert page.query_selector("#legend b") is None


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

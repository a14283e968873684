"""HTML reports of `check`, `plan` and `open-loop`: whole, escaped, alone; and how a browser shows them."""

import io
import os
import shutil
import xml.etree.ElementTree as ET
from itertools import product
from pathlib import Path

import browser
import numpy as np
import pytest
from conftest import CAMERAS, MICRO_EXPERT, MICRO_VLM, configuration, write_dataset
from folders import make_originals
from PIL import Image

from lerobot_pi0.tools import main
from lerobot_pi0.tools.reports.charts import BOTTOM, TOP, Curve, chart, ticks
from lerobot_pi0.tools.reports.markup import LOOK, Page, bar, note, picture, section, table, tag

HOSTILE = "<img src='http://example.com/x'>&\"\x1b[2J\u202e" + "a_name_that_does_not_end" * 5


@pytest.fixture(autouse=True)
def logs(monkeypatch) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of each verb, and one of `check` that is full of findings."""
    root = tmp_path_factory.mktemp("reports")
    made, _ = make_originals(root)["own"]
    policy = root / "a_name_of_a_run_that_does_not_end_so_soon/checkpoints/020000/pretrained_model"
    shutil.copytree(made, policy)
    write_dataset(root / "data", episodes=3, frames=12)
    write_dataset(root / "other", cameras=CAMERAS[1:3], dims=4)
    own, data = f"--policy.path={policy}", ["--dataset.repo_id=test/tiny", f"--dataset.root={root / 'data'}"]
    lines = {
        "check": [own, *data],
        "check, faults": [own, "--dataset.repo_id=test/other", f"--dataset.root={root / 'other'}"],
        "plan": [own, *data, "--modes=[frozen VLM, 'LoRA, cached contexts']"],
        "open-loop": [own, *data, "--observations=6", f"--output_dir={root / 'out'}"],
    }
    files = {name: root / "pages" / f"{name}.html" for name in lines}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
        patch.setitem(configuration.PALIGEMMA_PRESETS, "tiny", MICRO_VLM)
        patch.setitem(configuration.EXPERT_PRESETS, "tiny", MICRO_EXPERT)
        for name, line in lines.items():
            verb = name.split(",")[0]
            assert main([verb, *line, f"--html={files[name]}"]) in (0, 1 if verb == "check" else 0)
    return files


def parsed(file: Path) -> ET.Element:
    """The page as a tree; it is written so that a strict parser takes it too."""
    return ET.fromstring(file.read_text(encoding="utf-8"))


def text_of(tree: ET.Element) -> str:
    return " ".join(" ".join(tree.itertext()).split())


REPORTS = ("check", "check, faults", "plan", "open-loop")


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_whole_and_alone(pages, name):
    """Catches an element that is not closed, text that is not escaped, and what a browser would fetch or run."""
    tree = parsed(pages[name])
    for element in tree.iter():
        assert element.tag not in ("script", "link", "iframe", "object", "base", "a")
        for attribute, value in element.attrib.items():
            assert not attribute.startswith("on") and attribute not in ("href", "srcset")
            assert attribute != "src" or value.startswith("data:image/")
    assert "url(" not in (style := tree.findtext("head/style")) and "@import" not in style
    metas = {x.get("name") or x.get("http-equiv"): x.get("content") for x in tree.iter("meta")}
    assert metas["Content-Security-Policy"].startswith("default-src 'none'; img-src data:;")
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert [x.get("alt") for x in tree.iter("img")] == [x.text for x in tree.iter("figcaption")]


def test_what_the_pages_hold(pages):
    """Catches a part that is left out: a finding, a camera, a mode, a chart."""
    trees = {name: parsed(file) for name, file in pages.items()}
    headings = {name: [x.text for x in tree.iter("h2")] for name, tree in trees.items()}
    assert headings["check"] == ["Warnings", "Cameras", "Joints", "Fine"]
    assert headings["check, faults"] == ["Errors", "Warnings", "Cameras", "Joints", "Fine"]
    assert "joints action has 4 dims" in text_of(trees["check, faults"])
    assert "→ to fine-tune for another robot" in text_of(trees["check, faults"])
    assert len(list(trees["check"].iter("img"))) == 2 * 3 and "joint_5" in text_of(trees["check"])
    assert headings["plan"] == ["The peak of a training step", "Cards", "All numbers", "Cached contexts"]
    bars = [x.findtext("p/span") for x in trees["plan"].iter("div") if x.find("div[@class='bar']") is not None]
    assert bars == ["frozen VLM", "LoRA, cached contexts"]
    assert headings["open-loop"] == [
        "Error by step of the chunk", "What it reacts to", "Error by joint", "Roughness by joint",
        "What the actions look at", "Recorded and predicted",
    ]  # fmt: skip


def test_a_strangers_text(tmp_path):
    """Catches a name of a joint, a camera or a task that becomes markup, or moves the cursor of a terminal."""
    picture_, look = picture(b"x", HOSTILE), LOOK.read_text(encoding="utf-8")
    sections = [
        section(HOSTILE, HOSTILE), note("error", HOSTILE, HOSTILE, HOSTILE), table([[HOSTILE], [HOSTILE]]),
        bar(HOSTILE, HOSTILE, {"b1": 0.5}), picture_, tag("p", HOSTILE, title=HOSTILE),
        chart([Curve(np.arange(2), np.ones(2), "c1")], HOSTILE, HOSTILE, 0, 1),
    ]  # fmt: skip
    Page(HOSTILE, HOSTILE, sections).write(tmp_path / "page.html")
    tree = parsed(tmp_path / "page.html")
    assert [x.get("src") for x in tree.iter("img")] == ["data:image/png;base64,eA=="]
    shown = HOSTILE.replace("\x1b", " ").replace("\u202e", " ")
    assert text_of(tree).count(shown) == 16 and tree.find("body/p").get("title") == shown
    assert not {"\x1b", "\u202e"} & {*(tmp_path / "page.html").read_text(encoding="utf-8")} and "$body" in look


def test_curves_are_where_their_numbers_are():
    """Catches an axis that is turned over, and a curve that leaves its chart."""
    tree = ET.fromstring(chart([Curve(np.array([0, 1, 2]), np.array([0.0, 5.0, 99.0]), "c1", True)], "a", "b", 0, 10))
    points = [tuple(map(float, point.split(","))) for point in tree.find("polyline").get("points").split()]
    assert [y for _, y in points] == [BOTTOM, (BOTTOM + TOP) / 2, TOP]
    assert points[0][0] < points[1][0] < points[2][0]
    assert (float(tree.find("circle").get("cx")), float(tree.find("circle").get("cy"))) == points[0]
    labels = {x.text: float(x.get("y")) for x in tree.iter("text") if x.get("text-anchor") == "end"}
    assert labels["0"] > labels["10"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.013, 0.0171), (3, 3 + 1e-6), (-170, 1234), (1, 50)])
def test_ticks_are_few_and_round(low, high):
    """Catches an axis without numbers, or with too many for a phone."""
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    assert all(len(f"{x:g}") <= 8 for x in found)


# --- in a browser -----------------------------------------------------------------------------------------------

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if (program := browser.find()) is None:
        pytest.skip("no Chromium on this machine: nobody has looked at the reports (sh scripts/browser.sh installs it)")
    with browser.running(program, tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "scheme"), product(REPORTS, WIDTHS, SCHEMES))
def test_in_a_browser(pages, chromium, name, width, scheme, tmp_path):
    """Catches errors in the console, requests, text that leaves the screen, is too faint, or too small."""
    seen = chromium.look(pages[name], width, scheme == "dark")
    (Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"{name} {width} {scheme}.png").write_bytes(seen.picture)
    assert seen._replace(picture=b"") == browser.Seen([], [], [], [], [], b"")
    assert (brightness(seen.picture) < 0.5) == (scheme == "dark")


def brightness(picture: bytes) -> float:
    """The median of the grey values: the background's."""
    return float(np.median(Image.open(io.BytesIO(picture)).convert("L"))) / 255


FAULTS = {
    "errors": "<script>console.error('no')</script>",
    "requests": "<img src='http://127.0.0.1:9/x.png' alt=''>",
    "overflow": "<pre>" + "wide " * 100 + "</pre>",
    "faint": "<p style='color: #999; background: #fff'>faint</p>",
    "tiny": "<p style='font-size: 7px'>tiny</p>",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(chromium, tmp_path, fault):
    """Catches a browser test that always passes."""
    file = tmp_path / "page.html"
    file.write_text(f"<!DOCTYPE html><meta name=viewport content='width=device-width'><p>text</p>{FAULTS[fault]}")
    assert getattr(chromium.look(file, 390, dark=False), fault)

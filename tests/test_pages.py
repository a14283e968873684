"""Pages that a command writes are up to date, and the README is short and its badges are true."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from lerobot_pi0 import PI0Config
from lerobot_pi0.network.pi0 import PI0

ROOT = Path(__file__).parents[1]


def writer(name: str):
    """The script of docs/ that writes a page."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options():
    """Catches an option, a default or a help text that was changed without its page."""
    options = writer("options")
    assert options.PAGE.read_text() == options.page(), "python docs/options.py"


def test_the_hours_of_training():
    """Catches hours that are not the arithmetic that they are said to be, or of other arithmetic than was counted."""
    hardware = writer("hardware")
    assert hardware.hours_table() in hardware.PAGE.read_text(), "python docs/hardware.py"
    comparison = (ROOT / "docs/comparison.md").read_text()
    for what, tflop in hardware.TFLOP.items():
        assert f"| {tflop} TFLOP" in comparison, what
    first, *_ = re.findall(r"([\d.]+) h", hardware.hours_table())
    assert float(first) == pytest.approx(20_000 * 8 * 1.33 / 25 / 3600, abs=0.05)


def test_every_way_has_a_line():
    """Catches a way of training that is counted and not shown, or shown and not counted any more."""
    hardware = writer("hardware")
    table = hardware.PAGE.read_text().partition("<!-- memory -->")[2].partition("<!-- end of memory -->")[0]
    lines = [line for line in table.splitlines() if "GiB" in line]
    assert [line.split(" | ")[:2] for line in lines] == [[f"| {way.mode}", way.saves()] for way in hardware.WAYS]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_memory_of_cards(index):
    """Catches a table that `plan` would not write any more: full size, minutes."""
    hardware = writer("hardware")
    way = hardware.WAYS[index]
    assert hardware.row(way, hardware.count(way)) in hardware.PAGE.read_text(), "python docs/hardware.py"


def test_the_weights_that_control_needs():
    """Catches a size in pages that is not the network's, after a change of its parts."""
    config = PI0Config(device="cpu")
    with torch.device("meta"):
        network = PI0(config.architecture(), config.image_size)
    size = f"{2 * sum(p.numel() for p in network.parameters()) / 2**30:.1f} GiB"
    for page in ("hardware", "platforms"):
        assert f"{size}" in (ROOT / f"docs/{page}.md").read_text(), page


def test_the_readme_is_short():
    """Catches a README that grows: what is not for the first minutes belongs into docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_quotes_the_page_of_hardware():
    """Catches memory in the README that is not, or no longer, in the table that `plan` writes."""
    _, _, section = (ROOT / "README.md").read_text().partition("## Does it fit my card")
    section, page = section.partition("\n## ")[0], (ROOT / "docs/hardware.md").read_text()
    quoted = re.findall(r"\| ([\d.]+ GiB) \|$", section, re.MULTILINE)
    assert len(quoted) == 3
    assert all(f"| {memory} |" in page for memory in quoted)
    assert f"Driving the arm needs {re.search(r'Control needs .*?: ([0-9.]+ GiB)', page)[1]}" in section
    cameras = re.search(r"take ([\d.]+) hours with one\ncamera and ([\d.]+) h with three .* ([\d.]+ TFLOP/s)", section)
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    column = next(row for row in rows if row[0].startswith("20 000 steps")).index(cameras[3])
    for hours, many in zip(cameras.groups(), ("1 camera", "3 cameras"), strict=False):
        assert next(row for row in rows if row[0].startswith(f"frozen VLM, {many}"))[column] == f"{hours} h"


def test_badges_are_true():
    """Catches a badge with a version or a licence that pyproject.toml does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lerobot = next(x for x in project["dependencies"] if x.startswith("lerobot"))
    facts = {
        "licence": project["license"].replace("-", "--"),
        "python": project["requires-python"].replace(">=", "%E2%89%A5%20"),
        "LeRobot": re.search(r">=([\d.]+)", lerobot)[1],
    }
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-([^-]+(?:--[^-]+)*)-\w+", (ROOT / "README.md").read_text()))
    assert badges == facts


def test_every_page_is_in_the_index():
    """Catches a page that nobody finds."""
    index = (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name}" in index, page.name

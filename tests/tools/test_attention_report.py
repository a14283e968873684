"""The strips of the open-loop report that show what the actions look at."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from lerobot_pi0.control.attention_view import COLOUR, OPAQUE
from lerobot_pi0.tools.evaluation.attention import GAP, HEIGHT, Look, strip

BELOW = (10, 120, 40)


def look(frame: int, hot: tuple[int, int], weight: float, word: str = "red") -> Look:
    """Two cameras of 60 x 80 and 60 x 60 pixels in one colour; the first has one hot quarter, the second none."""
    heat = np.zeros((60, 80))
    heat[hot[0] * 30 : hot[0] * 30 + 30, hot[1] * 40 : hot[1] * 40 + 40] = weight
    pictures = [np.full((60, width, 3), BELOW, np.uint8) for width in (80, 60)]
    shares = {"front": 0.5, "left": 0.0, "prompt": 0.25, "state": 0.05, "actions": 0.2}
    return Look(frame, pictures, [heat, np.zeros((60, 60))], [("reach", 0.05), (word, 0.15), ("\n", 0.05)], shares)


def pictures_of(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_heat_lies_on_its_patch():
    """Catches heat on another patch, camera or observation than the one that was looked at, or of another strength."""
    drawn = pictures_of(strip(3, [look(0, (0, 1), 0.4), look(5, (1, 0), 0.2)]))
    full = (1 - OPAQUE) * np.array(BELOW) + OPAQUE * np.array(COLOUR)
    half = (1 - OPAQUE / 2) * np.array(BELOW) + OPAQUE / 2 * np.array(COLOUR)
    for column, hot, colour in zip(drawn, ((0, 1), (1, 0)), (full, half), strict=True):
        assert column.shape == (2 * HEIGHT + GAP, HEIGHT * 4 // 3, 3)
        for y, x in np.ndindex(2, 2):
            expected = colour if (y, x) == hot else np.array(BELOW)
            assert column[HEIGHT // 4 + HEIGHT // 2 * y, 60 + 120 * x] == pytest.approx(expected, abs=2), (y, x)
        second = column[HEIGHT + GAP + 10]
        assert (second[10] == BELOW).all() and (second[HEIGHT + 10] == 255).all()


def test_the_words_have_their_parts():
    """Catches numbers that are not the words' own parts, or are of one observation alone."""
    found = [look(0, (0, 0), 1), look(5, (0, 0), 1)._replace(words=[("reach", 0.2), ("red", 0.0), ("\n", 0.0)])]
    title, sentence, shares, *captions = re.findall(
        r"<(?:h3|p|figcaption).*?>(.*?)</(?:h3|p|figcaption)>", strip(3, found)
    )
    assert title == "Episode 3" and captions == ["frame 0", "frame 5"]
    assert re.sub(r"<[^>]+>", "", sentence) == "reach 56% red 33% ↵ 11% "
    assert "front 50%, left 0%, prompt 25%, state 5%, actions 20%" in shares


def test_words_are_no_html():
    """Catches an instruction that runs as a script in the reader's browser."""
    page = strip(0, [look(0, (0, 0), 1, word='<script>alert("x")</script>')])
    assert "<script" not in page and "&lt;script&gt;" in page

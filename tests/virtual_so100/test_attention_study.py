"""The benchmark of attention: where cubes are in pictures, and what it says about heat of which that is known."""

import importlib

import numpy as np
import pytest

pytest.importorskip("lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)")

import needs_rendering  # noqa: F401


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("attention")  # conftest has put benchmarks/ into the path


@pytest.fixture(scope="module")
def scenes(study):
    return study.scenes_of(6, 1000)


def test_boxes_are_around_the_cubes(scenes):
    """Catches a projection that is mirrored, of the other camera, or off by a cube: most pixels of a box have its
    cube's colour, unless the arm hides it, and no box of another colour has."""
    seen = 0
    for scene in scenes:
        for c, picture in enumerate(scene.large):
            for channel, cube in enumerate(("red", "green", "blue")):
                left, top, right, bottom = (round(192 * x) for x in scene.boxes[cube][c])
                assert 10 < right - left < 50 and 10 < bottom - top < 50
                own = (picture.argmax(axis=2) == channel) & (np.ptp(picture.astype(int), axis=2) > 60)
                inside = own[top : bottom + 1, left : right + 1]
                seen += inside.mean() > 0.5
                outside = own.copy()
                outside[max(0, top - 2) : bottom + 3, max(0, left - 2) : right + 3] = False
                assert channel == 0 or outside.mean() < 0.01  # the arm is orange, the rest is grey
    assert seen >= 33


def test_an_oracle_that_looks_at_the_cube(study, scenes):
    """Catches rates that are not of the cube that is asked for, and a chance that is not the cube's size."""
    told = [scene.layout.target for scene in scenes]
    others = [scene.layout.other for scene in scenes]
    on, off = (np.stack([s.patches(8, c) for s, c in zip(scenes, x, strict=True)]) for x in (told, others))
    heat = on.astype(float)
    found = study.aim(heat, on)
    for view in ("both", "front", "left"):
        assert found[view]["hottest"]["hits"] == len(scenes)
        assert found[view]["lift"]["mean"] == pytest.approx(np.mean([1 / own.mean() for own in heat]), rel=0.3)
    assert found["both"]["chance"] == pytest.approx(heat.mean())
    assert study.aim(heat, off)["both"]["hottest"]["hits"] < len(scenes) / 2
    assert study.hotter(heat, scenes, told, others)["hits"] == len(scenes)
    assert study.hotter(heat, scenes, others, told)["hits"] == 0


def test_what_is_covered(study, scenes):
    """Catches patches that are covered in the other camera's picture, transposed, or not as many as asked for."""
    score = np.random.default_rng(0).random((len(scenes), 2, 4, 4))
    which = study.chosen(score)
    assert (which.sum(axis=(1, 2, 3)) == study.COVERED).all()
    assert (score[which].reshape(len(scenes), -1).min(axis=1) > np.where(which, 0, score).max(axis=(1, 2, 3))).all()
    fill = np.full((2, 64, 64, 3), 7.0)
    for scene, own, pictures in zip(scenes, which, study.covered(scenes, which, fill), strict=True):
        for c, picture in enumerate(pictures):
            for row, column in np.ndindex(4, 4):
                place = slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16)
                expected = np.full_like(picture[place], 7) if own[c, row, column] else scene.pictures[c][place]
                assert (picture[place] == expected).all()

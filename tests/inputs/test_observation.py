"""From a batch to what the network sees: equal inputs in other clothes, every complaint, every warning."""

import logging

import pytest
import torch
from conftest import CAMERAS, DIMS, features, make_batch
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch.overrides import TorchFunctionMode

from lerobot_pi0 import PI0Config
from lerobot_pi0.inputs.observation import ObservationError, ObservationMaker, resize_with_pad

CPU = torch.device("cpu")
FRONT = CAMERAS[0]
WARNED = "lerobot_pi0.inputs.observation"


def maker(cameras=CAMERAS, dims: int = DIMS, **options) -> ObservationMaker:
    """An observation maker for images of 32 pixels and prompts of 12 tokens."""
    config = PI0Config(
        **features(cameras, dims), device="cpu", image_resolution=(32, 32), tokenizer_max_length=12, **options
    )
    config.validate_features()
    return ObservationMaker(config)


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == WARNED and r.levelno == logging.WARNING]


def without(batch: dict, *keys: str) -> dict:
    return {key: value for key, value in batch.items() if key not in keys}


# --- what is made -------------------------------------------------------------------------------------------


def test_shapes_and_ranges():
    """Catches images outside [-1, 1], a state that is not padded, and cameras in another order than the config's."""
    batch = make_batch(prompt=(7, 3))
    obs = maker()(dict(reversed(batch.items())), CPU)
    torch.testing.assert_close(obs.images_BNCHW, torch.stack([batch[key] for key in CAMERAS], dim=1) * 2 - 1)
    assert obs.tokens_BL.shape == obs.token_mask_BL.shape == (2, 7)
    assert torch.equal(obs.token_mask_BL.sum(dim=1), torch.tensor([7, 3]))
    assert torch.equal(obs.state_BA[:, :DIMS], batch[OBS_STATE])
    assert obs.state_BA.shape == (2, 32)
    assert not obs.state_BA[:, DIMS:].any()


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
@pytest.mark.parametrize("form", ["uint8", "channels last", "both"])
def test_images_in_other_forms(form, size):
    """Catches 8-bit or channels-last images that are read as something else than the float images they are."""
    bytes_BCHW = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    floats_BCHW = bytes_BCHW.float() / 255
    given = bytes_BCHW if form != "channels last" else floats_BCHW
    if form != "uint8":
        given = given.permute(0, 2, 3, 1)
    batch = make_batch(cameras=CAMERAS[1:])
    expected, got = (maker()(batch | {FRONT: x}, CPU) for x in (floats_BCHW, given))
    assert torch.equal(got.images_BNCHW, expected.images_BNCHW)


def test_arrays_and_other_dtypes():
    """Catches a demand for torch tensors of one dtype: environments give NumPy arrays, robots float64."""
    batch = make_batch()
    given = batch | {
        FRONT: batch[FRONT].numpy(),
        OBS_STATE: batch[OBS_STATE].double().numpy(),
        OBS_LANGUAGE_ATTENTION_MASK: batch[OBS_LANGUAGE_ATTENTION_MASK].long(),
    }
    (*tensors, padded, prefix), (*wanted, also_padded, _) = maker()(given, CPU), maker()(batch, CPU)
    assert padded == also_padded and prefix is None
    for got, expected in zip(tensors, wanted, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (33, 20), (16, 16)])
def test_resize_with_pad(height, width):
    """Catches distortion, padding on one side only, and padding that is not black."""
    white = resize_with_pad(torch.ones(1, 3, height, width), 32)[0, 0]
    rows, columns = white.any(dim=1), white.any(dim=0)
    ratio = max(height, width) / 32
    assert (int(rows.sum()), int(columns.sum())) == (int(height / ratio), int(width / ratio))
    for inside in (rows, columns):
        before, after = inside.int().argmax(), inside.flip(0).int().argmax()
        assert 0 <= after - before <= 1
    torch.testing.assert_close(white, (rows[:, None] & columns).float())


def test_padded_actions():
    """Catches actions that are cut or shifted, and state dims taken for action dims."""
    batch = make_batch()
    actions = maker().actions(batch, CPU)
    assert actions.shape == (2, 50, 32)
    assert torch.equal(actions[..., :DIMS], batch[ACTION])
    assert not actions[..., DIMS:].any()


def test_any_robot_on_a_general_checkpoint():
    """Catches a refusal of published checkpoints, whose config says 32 dims for every robot."""
    batch = make_batch(dims=7)
    assert torch.equal(maker(dims=32)(batch, CPU).state_BA[:, :7], batch[OBS_STATE])


class Synchronisations(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    NAMES = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "__contains__")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_one_synchronisation_per_batch():
    """Catches a check that reads a value from the device on its own: each one stalls a GPU."""
    make, batch = maker(), make_batch()
    with Synchronisations() as counted:
        make(batch, CPU)
        make.actions(batch, CPU)
    assert counted.names == ["tolist"]


# --- what is refused ----------------------------------------------------------------------------------------


def image(value: float, shape=(2, 3, 32, 32)) -> torch.Tensor:
    return torch.full(shape, value)


REFUSED = {
    "missing state": (
        lambda b: without(b, OBS_STATE),
        [f"no '{OBS_STATE}'", FRONT],
    ),
    "state without batch axis": (
        lambda b: b | {OBS_STATE: b[OBS_STATE][0]},
        [OBS_STATE, "(6,)", "(batch, dims)", "preprocessor"],
    ),
    "too many state dims": (
        lambda b: b | {OBS_STATE: torch.zeros(2, 33)},
        [OBS_STATE, "33", "32", "max_state_dim"],
    ),
    "another robot's state": (
        lambda b: b | {OBS_STATE: torch.zeros(2, 7)},
        [OBS_STATE, "7 dims", "(6,)", "another robot"],
    ),
    "NaN in the state": (
        lambda b: b | {OBS_STATE: b[OBS_STATE].index_fill(1, torch.tensor([2]), float("nan"))},
        [OBS_STATE, "NaN", "check the robot"],
    ),
    "infinite state": (
        lambda b: b | {OBS_STATE: b[OBS_STATE] / 0},
        [OBS_STATE, "infinity"],
    ),
    "no camera": (
        lambda b: without(b, *CAMERAS),
        ["no camera", *CAMERAS, OBS_STATE, "--rename_map"],
    ),
    "8-bit values as floats": (
        lambda b: b | {FRONT: image(200.0)},
        [FRONT, "200", "[0, 1]", "255"],
    ),
    "normalised images": (
        lambda b: b | {FRONT: image(-0.5)},
        [FRONT, "-0.5", "[0, 1]", "normalization_mapping"],
    ),
    "NaN in one pixel": (
        lambda b: b | {FRONT: b[FRONT].index_fill(3, torch.tensor([5]), float("nan"))},
        [FRONT, "nan"],
    ),
    "image without batch axis": (
        lambda b: b | {FRONT: b[FRONT][0]},
        [FRONT, "(3, 32, 32)", "(batch, 3, height, width)"],
    ),
    "four channels": (
        lambda b: b | {FRONT: image(0.5, (2, 4, 32, 32))},
        [FRONT, "(2, 4, 32, 32)", "RGB"],
    ),
    "grey images": (
        lambda b: b | {FRONT: image(0.5, (2, 1, 32, 32))},
        [FRONT, "(2, 1, 32, 32)", "RGB"],
    ),
    "more images than states": (
        lambda b: b | {FRONT: image(0.5, (3, 3, 32, 32))},
        [FRONT, "3 images", "2 states"],
    ),
    "no prompt": (
        lambda b: without(b, OBS_LANGUAGE_TOKENS),
        [OBS_LANGUAGE_TOKENS, "preprocessor", "--task"],
    ),
    "no mask of the prompt": (
        lambda b: without(b, OBS_LANGUAGE_ATTENTION_MASK),
        [OBS_LANGUAGE_ATTENTION_MASK, "preprocessor"],
    ),
    "mask of another shape": (
        lambda b: b | {OBS_LANGUAGE_ATTENTION_MASK: torch.ones(2, 11)},
        [OBS_LANGUAGE_TOKENS, "(2, 12)", "(2, 11)"],
    ),
    "one prompt for two states": (
        lambda b: b | {k: b[k][:1] for k in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)},
        [OBS_LANGUAGE_TOKENS, "(1, 12)", "(2, tokens)"],
    ),
    "prompt without tokens": (
        lambda b: b | {OBS_LANGUAGE_ATTENTION_MASK: torch.arange(12) < torch.tensor([[4], [0]])},
        ["no tokens", "'task'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """Catches a batch that would give silently wrong actions; the message holds key, finding and way out."""
    spoil, words = REFUSED[name]
    make, batch = maker(), make_batch()
    make(batch, CPU)
    with pytest.raises(ObservationError) as error:
        make(spoil(batch), CPU)
    for word in words:
        assert word in str(error.value)


REFUSED_ACTIONS = {
    "no actions": (lambda b: without(b, ACTION), ["no 'action'"]),
    "one step": (lambda b: b | {ACTION: b[ACTION][:, 0]}, ["'action'", "(2, 6)", "(batch, steps, dims)"]),
    "too few steps": (
        lambda b: b | {ACTION: b[ACTION][:, :49]},
        ["'action'", "49", "chunk_size is 50", "delta_timestamps"],
    ),
    "too many dims": (lambda b: b | {ACTION: torch.zeros(2, 50, 33)}, ["'action'", "33", "max_action_dim"]),
    "another robot": (lambda b: b | {ACTION: torch.zeros(2, 50, 7)}, ["'action'", "7 dims", "(6,)", "another robot"]),
}


@pytest.mark.parametrize("name", REFUSED_ACTIONS)
def test_refused_actions(name):
    """Catches training on actions of another robot, another chunk or another dataset format."""
    spoil, words = REFUSED_ACTIONS[name]
    with pytest.raises(ObservationError) as error:
        maker().actions(spoil(make_batch()), CPU)
    for word in words:
        assert word in str(error.value)


def test_errors_are_value_errors():
    """Catches an error class that callers who know only Python's cannot catch."""
    assert issubclass(ObservationError, ValueError)


def test_rounding_is_no_error():
    """Catches a refusal of images that interpolation or compression took a hair beyond [0, 1]."""
    make, batch = maker(), make_batch()
    make(batch | {FRONT: image(1.0005)}, CPU)
    make(batch | {FRONT: image(-0.0005)}, CPU)


# --- what is warned of --------------------------------------------------------------------------------------


def test_absent_cameras_are_warned_of_once(caplog):
    """Catches a silent absence (a camera unplugged), and a warning at each of 30 ticks a second."""
    make, batch = maker(), make_batch(cameras=CAMERAS[:1])
    for _ in range(3):
        assert make(batch, CPU).images_BNCHW.shape[1] == 1
    (message,) = warnings(caplog)
    assert CAMERAS[1] in message
    assert CAMERAS[2] in message
    assert CAMERAS[0] not in message


def test_pictures_of_another_size_are_warned_of_once(caplog):
    """Catches a policy that is evaluated on large pictures, shrunk, after training on small ones, in silence."""
    make, batch = maker(CAMERAS[:1]), make_batch(cameras=CAMERAS[:1])
    make(batch, CPU)
    assert not warnings(caplog)
    known = tuple(make.config.image_features[FRONT].shape[1:])
    larger = batch | {FRONT: torch.rand(2, 3, known[0] + 16, known[1])}
    for _ in range(2):
        make(larger, CPU)
    (message,) = warnings(caplog)
    assert f"{known[0] + 16} × {known[1]}" in message and f"config says {known[0]} × {known[1]}" in message


def test_a_base_does_not_say_what_cameras_have(caplog):
    """Catches a false alarm in each run that starts from a published base, which declares 224 pixels for any camera."""
    make, batch = maker(CAMERAS[:1]), make_batch(cameras=CAMERAS[:1])
    make.config.input_features[FRONT].shape = (3, 224, 224)
    make(batch | {FRONT: torch.rand(2, 3, 480, 640)}, CPU)
    assert not warnings(caplog)


def test_a_cut_prompt_is_warned_of_once(caplog):
    """Catches an instruction whose end, often the object's name, the network never sees."""
    make = maker()
    for _ in range(3):
        make(make_batch(prompt=(12, 3)), CPU)
    (message,) = warnings(caplog)
    assert "12" in message
    assert "tokenizer_max_length" in message


def test_nothing_to_warn_of(caplog):
    """Catches warnings in ordinary use, after which nobody reads any: slots of `empty_cameras` are meant empty."""
    maker(empty_cameras=1)(make_batch(prompt=(11, 3)), CPU)
    assert warnings(caplog) == []


def test_warnings_are_the_policys_own(caplog):
    """Catches a memory shared between policies: a second one would not warn at all."""
    for _ in range(2):
        maker()(make_batch(cameras=CAMERAS[:2]), CPU)
    assert len(warnings(caplog)) == 2

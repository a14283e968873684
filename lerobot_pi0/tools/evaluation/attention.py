"""What the actions of a policy look at, drawn for the report: pictures with heat over patches, words with weights.

The weights are those of `control.attention`, whose docstring says what they are not.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ...control.attention import Parts, heats, parts, recorded, words_of
from ...control.attention_view import COLOUR, tint
from ...inputs.steps import PI0TokenizerStep
from ...modeling_pi0 import PI0Policy
from ..reports.markup import Html, picture, section, tag
from .predictions import Runner

PICTURES = 6
"""Observations of an episode that are shown, from its first frame to its last."""

HEIGHT, GAP = 180, 4  # pixels

TEXT = """How much attention the action tokens give to each patch of the pictures and to each word: the mean over query
heads, layers, action tokens and the solver's steps. The strongest patch of an episode has the full colour; the numbers
at the words are parts of what all words get. This shows from where the network copies, not why it acts: a patch without
content can collect much attention, and what a patch shows may have reached the actions by way of another one. What the
policy uses is measured under “What it reacts to”."""


class Look(NamedTuple):
    """One observation, and where the attention goes."""

    frame: int
    pictures: list[np.ndarray]  # of each camera, uint8 (H, W, 3)
    heats: list[np.ndarray]  # of each camera (H, W)
    words: list[tuple[str, float]]
    shares: dict[str, float]


def looks(runner: Runner, rows: Sequence[int]) -> list[Look]:
    """Where the actions look in these observations of the runner's dataset."""
    batch, noise = runner.batch(rows)
    policy: Any = next(module for module in runner.policy.modules() if isinstance(module, PI0Policy))
    tokenizer = next(x.input_tokenizer for x in runner.preprocessor.steps if isinstance(x, PI0TokenizerStep))
    with torch.inference_mode(), recorded(policy.model) as seen:
        runner.policy.predict_action_chunk(batch, noise=noise)
        obs = policy.observe(batch, noise.device)
    found = Parts(*(x.cpu() for x in parts(seen.weights(), obs, policy.model)))
    made = []
    for i, row in enumerate(rows):
        hot = heats(found, batch, runner.config, i)
        alone = Parts(*(x[i : i + 1] for x in found))
        made.append(
            Look(
                int(runner.columns.frame[row]),
                [_uint8(batch[key][i]) for key in hot],
                [x.numpy() for x in hot.values()],
                words_of(tokenizer, obs, found, i),
                alone.shares([key.removeprefix("observation.images.") for key in hot]),
            )
        )
    return made


def strips(runner: Runner, plots: int) -> list[Html]:
    """A section of the report's page that shows the first `plots` episodes; none for 0."""
    found = []
    for number in np.unique(runner.columns.episode[runner.rows])[:plots].tolist():
        mine = np.flatnonzero(runner.columns.episode == number)
        spread = np.unique(np.linspace(0, len(mine) - 1, PICTURES).astype(int))
        found.append(strip(number, looks(runner, mine[spread].tolist())))
    return [section("What the actions look at", TEXT, *found)] if found else []


def strip(episode: int, found: list[Look]) -> Html:
    """The words of an episode, and its pictures side by side, the cameras of an observation below each other."""
    most = max(float(heat.max()) for look in found for heat in look.heats)
    shares = {name: np.mean([look.shares[name] for look in found]) for name in found[0].shares}
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return tag(
        "div",
        tag("h3", f"Episode {episode}"),
        tag("p", *_sentence(found)),
        tag("p", f"Of all attention: {told}.", class_="quiet"),
        tag("div", *(picture(_column(look, most), f"frame {look.frame}") for look in found), class_="strip"),
    )


def _sentence(found: list[Look]) -> list[Html]:
    """The words of an episode's prompt, each with its part of what all words get, as colour and number."""
    texts = [text.replace("\n", "↵") for text, _ in found[0].words]
    weights = np.mean([[weight for _, weight in look.words] for look in found], axis=0)
    parts_of_words = weights / max(weights.sum(), 1e-12)
    colour = ", ".join(map(str, COLOUR))
    marked = []
    for text, part in zip(texts, parts_of_words, strict=True):
        style = f"border-bottom: .25em solid rgba({colour}, {part / parts_of_words.max():.2f})"
        marked += [tag("span", text, style=style), tag("small", f" {part:.0%} ")]
    return marked


def _column(look: Look, most: float) -> bytes:
    """The pictures of an observation below each other, as a PNG file."""
    heated = [_heated(*x, most) for x in zip(look.pictures, look.heats, strict=True)]
    widest = max(x.shape[1] for x in heated)
    padded = [np.pad(x, ((0, GAP), (0, widest - x.shape[1]), (0, 0)), constant_values=255) for x in heated]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(padded)[:-GAP]).save(buffer, format="png")
    return buffer.getvalue()


def _uint8(picture: torch.Tensor) -> np.ndarray:
    """A picture with channels last, 0 to 255."""
    x = picture if picture.dtype == torch.uint8 else (picture.float() * 255).round().clamp(0, 255).byte()
    return (x if x.shape[-1] == 3 else x.permute(1, 2, 0)).cpu().numpy()


def _heated(picture: np.ndarray, heat: np.ndarray, most: float) -> np.ndarray:
    """A picture of the same height as all others, under its heat."""
    size = (max(1, round(HEIGHT * picture.shape[1] / picture.shape[0])), HEIGHT)
    below = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR).convert("RGBA")
    above = Image.fromarray(tint(heat, most)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(Image.alpha_composite(below, above).convert("RGB"))

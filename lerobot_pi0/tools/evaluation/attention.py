"""What the actions of a policy look at, drawn for the report: pictures with heat over patches, words with weights.

The weights are those of `control.attention`, whose docstring says what they are not.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ...control.attention import Parts, heats, parts, recorded, words
from ...control.attention_view import COLOUR, tint
from ...inputs.steps import PI0TokenizerStep
from ...modeling_pi0 import PI0Policy
from .predictions import Runner

PICTURES = 5
"""Observations in a strip."""

HEIGHT, GAP = 150, 4  # pixels

TEXT = """<h2>What the actions look at</h2>
<p>How much attention the action tokens give to each patch of the pictures and to each word: the mean over query heads,
layers, action tokens and the solver's steps. The strongest patch of a strip has the full colour; the numbers at the
words are parts of what all words get. This shows from where the network copies, not why it acts: a patch without
content can collect much attention, and what a patch shows may have reached the actions by way of another one. What the
policy uses is measured above, under “What it reacts to”.</p>
"""


class Look(NamedTuple):
    """One observation, and where the attention goes."""

    frame: int
    pictures: list[np.ndarray]  # of each camera, uint8 (H, W, 3)
    heats: list[np.ndarray]  # of each camera (H, W)
    words: list[tuple[str, float]]
    shares: dict[str, float]


def looks(runner: Runner, chosen: Sequence[int]) -> list[Look]:
    """Where the actions look in these of the runner's observations."""
    batch, noise = runner.batch(chosen)
    policy: Any = next(module for module in runner.policy.modules() if isinstance(module, PI0Policy))
    tokenizer = next(x.input_tokenizer for x in runner.preprocessor.steps if isinstance(x, PI0TokenizerStep))
    with torch.inference_mode(), recorded(policy.model) as seen:
        runner.policy.predict_action_chunk(batch, noise=noise)
        obs = policy.observe(batch, noise.device)
    found = Parts(*(x.cpu() for x in parts(seen.weights(), obs, policy.model)))
    made = []
    for i, chosen_row in enumerate(chosen):
        hot = heats(found, batch, runner.config, i)
        tokens = obs.tokens_BL[i][obs.token_mask_BL[i]].tolist()
        weights = found.prompt_BL[i][obs.token_mask_BL[i].cpu()].tolist()
        alone = Parts(*(x[i : i + 1] for x in found))
        made.append(
            Look(
                int(runner.columns.frame[runner.rows[chosen_row]]),
                [_uint8(batch[key][i]) for key in hot],
                [x.numpy() for x in hot.values()],
                words(tokenizer, tokens, weights),
                alone.shares([key.removeprefix("observation.images.") for key in hot]),
            )
        )
    return made


def section(runner: Runner, plots: int) -> str:
    """A part of the report's page, with a strip for each of the first `plots` episodes; nothing for none."""
    episode = runner.columns.episode[runner.rows]
    strips = []
    for number in np.unique(episode)[:plots].tolist():
        mine = np.flatnonzero(episode == number)
        chosen = mine[np.unique(np.linspace(0, len(mine) - 1, min(len(mine), PICTURES)).astype(int))]
        strips.append(strip(number, looks(runner, chosen.tolist())))
    return TEXT + "\n".join(strips) if strips else ""


def strip(episode: int, found: list[Look]) -> str:
    """The pictures of an episode's observations side by side, cameras below each other; above them the words."""
    most = max(float(heat.max()) for look in found for heat in look.heats)
    columns = [[_heated(*x, most) for x in zip(look.pictures, look.heats, strict=True)] for look in found]
    buffer = io.BytesIO()
    Image.fromarray(_stacked([_stacked(column, 0) for column in columns], 1)).save(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    shares = {name: np.mean([look.shares[name] for look in found]) for name in found[0].shares}
    title = f"Episode {episode}, frames {', '.join(str(look.frame) for look in found)}"
    told = ", ".join(f"{html.escape(name)} {share:.0%}" for name, share in shares.items())
    return (
        f"<p>{title}: {_sentence(found)}<br><small>Of all attention: {told}.</small></p>"
        f'<img alt="{title}: where the actions look" src="data:image/png;base64,{data}">'
    )


def _sentence(found: list[Look]) -> str:
    """The words of an episode's prompt, each with its part of what all words get, as colour and number."""
    texts = [text for text, _ in found[0].words]
    weights = np.mean([[weight for _, weight in look.words] for look in found], axis=0)
    parts_of_words = weights / max(weights.sum(), 1e-12)
    return " ".join(
        f'<span style="background: rgba({", ".join(map(str, COLOUR))}, {0.7 * part / parts_of_words.max():.2f}); '
        f'padding: .1em .2em">{html.escape(text.replace(chr(10), "↵"))}</span> <small>{part:.0%}</small>'
        for text, part in zip(texts, parts_of_words, strict=True)
    )


def _uint8(picture: torch.Tensor) -> np.ndarray:
    """A picture with channels last, 0 to 255."""
    x = picture if picture.dtype == torch.uint8 else (picture.float() * 255).round().clamp(0, 255).byte()
    return (x if x.shape[-1] == 3 else x.permute(1, 2, 0)).cpu().numpy()


def _heated(picture: np.ndarray, heat: np.ndarray, most: float) -> np.ndarray:
    """A picture of the strip's height under its heat."""
    size = (max(1, round(HEIGHT * picture.shape[1] / picture.shape[0])), HEIGHT)
    below = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR).convert("RGBA")
    above = Image.fromarray(tint(heat, most)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(Image.alpha_composite(below, above).convert("RGB"))


def _stacked(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures beside (axis 1) or below (axis 0) each other, white between them and where one is shorter."""
    other = max(picture.shape[1 - axis] for picture in pictures)
    padded = []
    for picture in pictures:
        room = [(0, 0)] * 3
        room[axis], room[1 - axis] = (0, GAP), (0, other - picture.shape[1 - axis])
        padded.append(np.pad(picture, room, constant_values=255))
    return np.concatenate(padded, axis=axis)

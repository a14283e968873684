"""Draw docs/architecture.png from the network itself.

    python docs/architecture.py

Sizes and counts are read off the full-size network on fake tensors, which have shapes and no numbers. The mask is what
a network of the same code, with few tokens, hands to its attention; which products are computed is what hooks saw.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lerobot_pi0.network.pi0 import PI0, Observation
from lerobot_pi0.network.sizes import (
    EXPERT_PRESETS,
    PALIGEMMA_PRESETS,
    Architecture,
    GemmaSize,
    PaliGemmaSize,
    VisionSize,
)

VLM, STATE, ACTIONS, NOBODY = "#3b6fb6", "#d9822b", "#3a9457", "#e9e9ec"
INK = "#222222"
FULL = Architecture(PALIGEMMA_PRESETS["gemma_2b"], EXPERT_PRESETS["gemma_300m"])
FEW = Architecture(
    PaliGemmaSize(
        VisionSize(width=8, depth=1, mlp_dim=8, heads=1, patch_size=16, image_size=32), GemmaSize(8, 2, 8, 1, 8), 16
    ),
    GemmaSize(width=8, depth=2, mlp_dim=8, heads=1, head_dim=8),
)
STEPS, CHUNK, PROMPT = 4, 50, 48
PRODUCTS = ("k_proj", "v_proj", "q_proj", "o_proj", "mlp")


def observation(arch: Architecture, cameras: int, prompt: int, padding: int = 0) -> Observation:
    side = arch.vlm.vision.image_size
    mask = torch.arange(prompt)[None] < prompt - padding
    images, tokens = torch.zeros(1, cameras, 3, side, side), torch.zeros(1, prompt, dtype=torch.long)
    return Observation(images, tokens, mask, torch.zeros(1, arch.state_dim))


def run(network: PI0, obs: Observation, samples: int, steps: int) -> Tensor:
    """One context and one velocity."""
    noise, time = torch.zeros(1, samples, steps, network.arch.action_dim), torch.full((1, samples, 1), 0.5)
    return network.velocity(noise, network.embed_time(time), network.context(obs))


def masks(obs: Observation, samples: int) -> np.ndarray:
    """Which token (row) sees which (column), as the first layers of both transformers are told."""
    network, seen = PI0(FEW, FEW.vlm.vision.image_size).eval(), []
    for stack in (network.vlm, network.expert):
        stack.layers[0].register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], args[2].bias[0])))
    with torch.no_grad():
        run(network, obs, samples, STEPS)
    rows = [np.broadcast_to((mask == 0).numpy(), (tokens, mask.shape[-1])) for tokens, mask in seen]
    size = rows[-1].shape[1]
    return np.concatenate([np.pad(part, ((0, 0), (0, size - part.shape[1]))) for part in rows])


def products(network: PI0) -> dict[str, np.ndarray]:
    """Per block of tokens, whether each product of each layer is computed: (layers, products)."""
    depth = network.vlm.cfg.depth
    found = {name: np.zeros((depth, len(PRODUCTS)), bool) for name in ("prefix", "state", "actions")}
    now = {"expert": "state"}

    def watch(module: nn.Module, stack: str, layer: int, product: int) -> None:
        def hook(*_: object) -> None:
            found["prefix" if stack == "vlm" else now["expert"]][layer, product] = True

        module.register_forward_hook(hook)

    for stack in ("vlm", "expert"):
        for i, layer in enumerate(getattr(network, stack).layers):
            for j, name in enumerate(PRODUCTS):
                watch(layer.mlp if name == "mlp" else getattr(layer.self_attn, name), stack, i, j)
    network.action_in_proj.register_forward_hook(lambda *_: now.update(expert="actions"))
    run(network, observation(network.arch, 3, PROMPT), 1, CHUNK)
    return found


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, alpha: float = 0.18) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.7", fc=(colour, alpha), ec=colour, lw=1.4)
    )
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10, color=INK, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=INK, lw=1.2))


def millions(part: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()) / 1e6:,.0f} M"


def draw_calls(axes: Axes, network: PI0) -> None:
    """From inputs (below) through tokens to the two calls."""
    vision, vlm, expert = FULL.vlm.vision, FULL.vlm.gemma, FULL.expert
    patches = (vision.image_size // vision.patch_size) ** 2
    axes.set(xlim=(0, 100), ylim=(-0.5, 43))
    axes.axis("off")
    axes.text(31, 41.6, "context: once per observation", ha="center", fontsize=13, weight="bold")
    axes.text(83.5, 41.6, "velocity: once per Euler step", ha="center", fontsize=13, weight="bold")

    box(axes, 0.5, 0, 27, 6, f"each camera, resized to {vision.image_size}²", VLM)
    box(axes, 0.5, 9, 27, 6, f"SigLIP So400m/{vision.patch_size} ({millions(network.vision)})\nand a projector", VLM)
    box(axes, 30.5, 0, 14, 15, f"prompt,\nat most {PROMPT}\ntokens", VLM)
    box(axes, 48, 0, 13, 15, f"state, padded\nto {FULL.state_dim} numbers;\nstate_proj", STATE)
    box(axes, 69, 0, 30, 5, f"noisy actions, {CHUNK} × {FULL.action_dim}, and time t", ACTIONS)
    box(axes, 69, 10, 30, 5, "action_in_proj, sin-cos of t,\naction_time_mlp", ACTIONS)
    arrow(axes, (14, 6), (14, 9))
    arrow(axes, (97.8, 5), (97.8, 10))

    box(axes, 0.5, 19, 44, 5, f"prefix: {patches} tokens a camera, and the prompt's", VLM, 0.35)
    box(axes, 48, 19, 13, 5, "1 token", STATE, 0.35)
    box(axes, 69, 19, 30, 5, f"{CHUNK} tokens", ACTIONS, 0.35)
    for x in (14, 37.5, 54.5, 84):
        arrow(axes, (x, 15), (x, 19))
    size = f"{vlm.depth} layers, {vlm.heads} query heads, 1 key/value head of {vlm.head_dim}"
    box(axes, 0.5, 28, 44, 11, f"Gemma 2B ({millions(network.vlm)}), width {vlm.width}\n{size}", VLM)
    text = f"action expert ({millions(network.expert)}):\nGemma, width {expert.width}"
    box(axes, 48, 28, 13, 11, "action expert\n(the same\nweights)", STATE)
    box(axes, 69, 28, 30, 11, f"{text}, {expert.depth} layers\n→ action_out_proj → velocity v", ACTIONS)
    for x in (22.5, 54.5, 84):
        arrow(axes, (x, 24), (x, 28))
    arrow(axes, (44.5, 33.5), (48, 33.5))
    arrow(axes, (61, 33.5), (69, 33.5))
    axes.text(65, 34.3, "keys and\nvalues", ha="center", va="bottom", fontsize=8.5)
    axes.text(65, 32.7, "of each\nlayer", ha="center", va="top", fontsize=8.5)
    axes.text(83, 7.5, "x ← x - v/10, ten times, from t = 1 to 0", ha="center", va="center", fontsize=9.5)


def draw_mask(axes: Axes, obs: Observation, samples: int) -> None:
    """Rows: who looks; columns: who is seen; coloured by whose weights the row's token uses."""
    visible = masks(obs, samples)
    size, cameras = len(visible), obs.images_BNCHW.shape[1]
    patches = (FEW.vlm.vision.image_size // FEW.vlm.vision.patch_size) ** 2
    groups = [(f"camera {i + 1}", patches, VLM) for i in range(cameras)]
    groups += [("prompt", obs.tokens_BL.shape[1], VLM), ("state", 1, STATE)]
    groups += [(f"actions, draw {i + 1}", STEPS, ACTIONS) for i in range(samples)]
    padded = [cameras * patches + int(i) for i in np.flatnonzero(~obs.token_mask_BL[0].numpy())]
    start = 0
    for name, length, colour in groups:
        for row in range(start, start + length):
            for column in range(size):
                shown = colour if visible[row, column] else NOBODY
                alpha = 0.25 if row in padded else 0.85
                axes.add_patch(
                    Rectangle((column, row), 0.92, 0.92, fc=shown, alpha=alpha if visible[row, column] else 1)
                )
        middle = start + length / 2
        axes.text(-0.5, middle, name, ha="right", va="center", fontsize=10, color=colour)
        axes.text(middle, -0.5, name, ha="left", va="bottom", fontsize=10, color=colour, rotation=45)
        for line in (start, start + length):
            axes.plot([0, size], [line, line], color="white", lw=2)
            axes.plot([line, line], [0, size], color="white", lw=2)
        start += length
    for i in padded:
        axes.text(i + 0.46, size + 0.3, "padding", ha="center", va="top", fontsize=9, rotation=90)
    axes.set(xlim=(-7, size + 0.2), ylim=(size + 3.2, -5.5), aspect="equal")
    axes.axis("off")
    axes.set_title("who (row) sees whom (column)", fontsize=13, weight="bold", loc="center")


def draw_products(axes: Axes, network: PI0) -> None:
    """Layers upwards; a filled cell is computed."""
    titles = {"prefix": ("prefix", VLM), "state": ("state", STATE), "actions": ("actions", ACTIONS)}
    labels = ("K", "V", "Q", "out", "MLP")  # as PRODUCTS
    for i, (name, table) in enumerate(products(network).items()):
        title, colour = titles[name]
        left = i * (len(labels) + 1.4)
        for (layer, product), computed in np.ndenumerate(table):
            at = (left + product, layer)
            style = (
                {"fc": colour, "alpha": 0.8}
                if computed
                else {"fc": "white", "ec": "#999999", "lw": 0.8, "hatch": "////"}
            )
            axes.add_patch(Rectangle(at, 0.88, 0.88, **style))
        for product, label in enumerate(labels):
            axes.text(left + product + 0.44, -0.3, label, ha="center", va="top", fontsize=8, rotation=90)
        axes.text(left + 2.5, len(table) + 0.4, title, ha="center", fontsize=11, color=colour, weight="bold")
    depth = network.vlm.cfg.depth
    for layer in range(depth):
        axes.text(-0.5, layer + 0.44, str(layer + 1), ha="right", va="center", fontsize=8.5)
    axes.text(-2.3, depth / 2, "layer", rotation=90, va="center", ha="center", fontsize=10)
    axes.set(xlim=(-3, 19), ylim=(-2.6, depth + 1.5))
    axes.axis("off")
    axes.set_title("what is computed (filled) at full size", fontsize=13, weight="bold")


def draw(file: Path) -> None:
    """The picture."""
    figure = plt.figure(figsize=(13, 13.2))
    grid = figure.add_gridspec(2, 2, height_ratios=[5.2, 7], width_ratios=[7.3, 5.7], hspace=0.1, wspace=0.04)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network = PI0(FULL, FULL.vlm.vision.image_size).eval()
        draw_calls(figure.add_subplot(grid[0, :]), network)
        draw_products(figure.add_subplot(grid[1, 1]), network)
    draw_mask(figure.add_subplot(grid[1, 0]), observation(FEW, cameras=2, prompt=4, padding=1), samples=2)
    figure.savefig(file, dpi=110, bbox_inches="tight", pad_inches=0.2)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))

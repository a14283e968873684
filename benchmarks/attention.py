"""Does the attention of the actions mean something? On the demo's task, where it is known which cube the words name.

    python benchmarks/attention.py --policy=DIR                    # one policy, and its sentence without meaning
    python benchmarks/attention.py --policy=DIR --deafen=DATASET   # makes a policy that is deaf, and measures both

A policy that `make demo` trained sees the first picture of unseen scenes, and is told one cube and then another one in
the same scene. Asked are: how often the hottest patch is a patch of the named cube, beside chance; and whether the
chunk moves further when the hottest patches are covered than when as many others are. A deaf policy is the trained one
after more steps of training in which words are exchanged between the samples of a batch.

A patch is a cube's if the box around the cube, projected into the picture, touches it: cubes are smaller than patches.
Proportions have Wilson's 95 % interval over scenes, means 1.96 standard errors.
Axes: B scenes, C cameras, G layers, H and W rows and columns of patches, T steps of a chunk, A joints.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from control import Driver
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.envs.utils import preprocess_observation
from lerobot_env_virtual_so100.constants import CAMERAS, FPS
from lerobot_env_virtual_so100.scene import COLOURS, CUBE_HALF
from lerobot_env_virtual_so100.score import wilson
from lerobot_env_virtual_so100.simulation import Simulation
from lerobot_env_virtual_so100.tasks import Layout, make_task
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lerobot_pi0 import PI0Policy
from lerobot_pi0.control.attention import on_picture, parts, recorded, words
from lerobot_pi0.control.attention_view import tint
from lerobot_pi0.inputs.steps import PI0TokenizerStep

SIDE = 64  # pixels of the policy's pictures
COVERED = 4  # patches of both pictures that are covered
DRAWS = 5  # random choices of other patches, for each scene
BATCH = 25
DEAF_STEPS = 400
SHOWN = 4  # scenes in the picture


@dataclass
class Scene:
    """An unseen scene at its start."""

    layout: Layout
    joints: np.ndarray  # (6,)
    pictures: list[np.ndarray]  # of each camera, uint8 (SIDE, SIDE, 3)
    large: list[np.ndarray]  # the same, to be looked at
    boxes: dict[str, list[tuple[float, ...]]]  # by cube: left, top, right, bottom in each camera's picture, in [0, 1]

    def patches(self, grid: int, *cubes: str) -> np.ndarray:
        """Which patches of each camera the boxes of these cubes touch, boolean (C, grid, grid)."""
        found = np.zeros((len(CAMERAS), grid, grid), bool)
        for cube in cubes:
            for own, box in zip(found, self.boxes[cube], strict=True):
                left, top, right, bottom = (min(max(int(x * grid), 0), grid - 1) for x in box)
                own[top : bottom + 1, left : right + 1] = True
        return found


def box_of(sim: Simulation, cube: str, camera: str) -> tuple[float, ...]:
    """The box around a cube in a camera's square picture: left, top, right, bottom, as parts of its side."""
    body, eye = sim.data.body(cube), sim.data.camera(camera)
    corners = np.array(list(itertools.product((-CUBE_HALF, CUBE_HALF), repeat=3)))
    world = body.xpos + corners @ body.xmat.reshape(3, 3).T
    x, y, z = ((world - eye.xpos) @ eye.xmat.reshape(3, 3)).T  # a camera looks along -z
    scale = 0.5 / np.tan(np.radians(sim.model.camera(camera).fovy[0]) / 2)
    across, down = 0.5 + scale * x / -z, 0.5 - scale * y / -z
    return float(across.min()), float(down.min()), float(across.max()), float(down.max())


def scenes_of(count: int, first: int) -> list[Scene]:
    """The scenes that `make demo` evaluates on, from this seed on."""
    task = make_task("reach")
    sim, found = Simulation(task.spec, FPS), []
    for seed in range(first, first + count):
        layout = task.sample("test", seed)
        sim.load(layout)
        mujoco.mj_forward(sim.model, sim.data)
        boxes = {cube: [box_of(sim, cube, camera) for camera in CAMERAS] for cube in task.spec.cubes}
        found.append(Scene(layout, sim.arm.state.copy(), sim.images(SIDE, SIDE), sim.images(192, 192), boxes))
    return found


@dataclass
class Answer:
    """What a policy does in each scene, and where it looks."""

    chunk_BTA: Tensor  # normalised
    heat_GBCHW: np.ndarray
    colour_B: np.ndarray  # what the name of the colour gets, as part of what all words get
    shares: dict[str, float]


def ask(driver: Driver, scenes: list[Scene], told: list[str], pictures: list[list[np.ndarray]] | None = None) -> Answer:
    """Tell the policy a sentence in each scene.

    Args:
        pictures: in place of the scenes' own.
    """
    pictures, policy = pictures or [scene.pictures for scene in scenes], driver.policy
    chunks, heats, colours, shares = [], [], [], []
    for start in range(0, len(scenes), BATCH):
        rows = slice(start, start + BATCH)
        pixels = {name: np.stack([own[c] for own in pictures[rows]]) for c, name in enumerate(CAMERAS)}
        joints = np.stack([scene.joints for scene in scenes[rows]]).astype(np.float32)
        seen = preprocess_observation({"pixels": pixels, "agent_pos": joints})
        batch = driver.pre(seen | {"task": told[rows]})
        noise = torch.stack([noise_of(policy, scene.layout.seed) for scene in scenes[rows]])
        with torch.no_grad(), recorded(policy.model) as heard:
            chunks.append(policy.predict_action_chunk(batch, noise=noise))
        obs = policy.observe(batch, noise.device)
        layers = [parts(weights, obs, policy.model) for weights in heard.by_layer()]
        heats.append(torch.stack([layer.patches_BNHW for layer in layers]))
        found = parts(heard.weights(), obs, policy.model)
        shares.append(found.shares([*CAMERAS]))
        colours += [
            colour_part(driver, *x) for x in zip(obs.tokens_BL, obs.token_mask_BL, found.prompt_BL, strict=True)
        ]
    shared = {name: float(np.mean([x[name] for x in shares])) for name in shares[0]}
    return Answer(torch.cat(chunks), torch.cat(heats, dim=1).double().numpy(), np.array(colours), shared)


def colour_part(driver: Driver, tokens_L: Tensor, mask_L: Tensor, weights_L: Tensor) -> float:
    """What the name of the colour gets, as part of what all words of a prompt get."""
    tokenizer = next(x.input_tokenizer for x in driver.pre.steps if isinstance(x, PI0TokenizerStep))
    found = words(tokenizer, tokens_L[mask_L].tolist(), weights_L[mask_L].tolist())
    return sum(x for word, x in found if word in COLOURS) / sum(x for _, x in found)


def noise_of(policy: PI0Policy, seed: int) -> Tensor:
    """The noise of a scene, whatever the policy is told."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(policy.config.chunk_size, policy.config.max_action_dim, generator=draw)


# --- where it looks ---------------------------------------------------------------------------------------------


def rate(hits: np.ndarray) -> dict[str, Any]:
    """How often something is so, with its interval."""
    return {"of": len(hits), "hits": int(hits.sum()), "interval_95": wilson(int(hits.sum()), len(hits))}


def mean(values: np.ndarray) -> dict[str, float]:
    """A mean with the half width of its interval."""
    return {"mean": float(values.mean()), "half_95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))}


def aim(heat_BCHW: np.ndarray, on_BCHW: np.ndarray) -> dict[str, Any]:
    """How the heat lies on some patches of each scene: in both pictures together, and in each."""
    found: dict[str, Any] = {}
    for name, view in {"both": slice(None), **{camera: slice(c, c + 1) for c, camera in enumerate(CAMERAS)}}.items():
        heat, on = (x[:, view].reshape(len(x), -1) for x in (heat_BCHW, on_BCHW))
        hits = on[np.arange(len(on)), heat.argmax(axis=1)]
        lift = (heat * on).sum(axis=1) / heat.sum(axis=1) / on.mean(axis=1)
        found[name] = {"hottest": rate(hits), "chance": float(on.mean()), "lift": mean(lift)}
    return found


def hotter(heat_BCHW: np.ndarray, scenes: list[Scene], cubes: list[str], others: list[str]) -> dict[str, Any]:
    """How often a patch of one cube is hotter than every patch of the other; a patch of both counts for neither."""
    grid, hits = heat_BCHW.shape[-1], []
    for heat, scene, cube, other in zip(heat_BCHW, scenes, cubes, others, strict=True):
        ours, theirs = scene.patches(grid, cube), scene.patches(grid, other)
        ours, theirs = ours & ~theirs, theirs & ~ours
        if ours.any() and theirs.any():
            hits.append(heat[ours].max() > heat[theirs].max())
    return rate(np.array(hits))


def sights(heat_GBCHW: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Ways to make one heat of all layers, by name."""
    whole = heat_GBCHW.mean(axis=0)
    yield "all layers", whole
    yield "all layers, beside the usual", whole / whole.mean(axis=0, keepdims=True)
    yield from ((f"layer {i + 1}", layer) for i, layer in enumerate(heat_GBCHW))


def looking(driver: Driver, scenes: list[Scene]) -> dict[str, Any]:
    """Where the policy looks when it is told the scene's target, then another cube, and a sentence that never changes.

    For each, how the heat lies on the target, on the other cube, and on the third.
    """
    task = make_task("reach")
    targets, others = [s.layout.target for s in scenes], [s.layout.other for s in scenes]
    thirds = [next(c for c in task.spec.cubes if c not in pair) for pair in zip(targets, others, strict=True)]
    sentences = {
        "told the target": [task.instruction(c, s.layout.phrase) for c, s in zip(targets, scenes, strict=True)],
        "told another cube": [task.instruction(c, s.layout.phrase) for c, s in zip(others, scenes, strict=True)],
        "always told red": [task.instruction("red", 0)] * len(scenes),
    }
    answers = {name: ask(driver, scenes, told) for name, told in sentences.items()}
    found: dict[str, Any] = {}
    for name, answer in answers.items():
        found[name] = {"shares": answer.shares, "colour's part of the words": mean(answer.colour_B), "sights": {}}
        for sight, heat in sights(answer.heat_GBCHW):
            grid = heat.shape[-1]
            on = {x: [(c,) for c in cubes] for x, cubes in (("target", targets), ("other", others), ("third", thirds))}
            on["any"] = [task.spec.cubes] * len(scenes)
            found[name]["sights"][sight] = {
                x: aim(heat, np.stack([s.patches(grid, *c) for s, c in zip(scenes, cubes, strict=True)]))
                for x, cubes in on.items()
            }
            found[name]["sights"][sight]["target hotter than other"] = hotter(heat, scenes, targets, others)
    chunks = [answers[name].chunk_BTA for name in ("told the target", "told another cube")]
    found["chunk moves with the words"] = mean(moved(*chunks))
    return found


# --- what it needs ----------------------------------------------------------------------------------------------


def moved(first_BTA: Tensor, second_BTA: Tensor) -> np.ndarray:
    """How far chunks lie apart: root mean square over steps and joints, normalised units (B,)."""
    return (first_BTA - second_BTA).square().mean(dim=(1, 2)).sqrt().numpy()


def covered(scenes: list[Scene], which_BCHW: np.ndarray, fill_CSS3: np.ndarray) -> list[list[np.ndarray]]:
    """The pictures with other pixels in some patches."""
    patch = SIDE // which_BCHW.shape[-1]
    under = which_BCHW.repeat(patch, axis=2).repeat(patch, axis=3)[..., None]
    return [
        [
            np.where(mask, fill, own).astype(np.uint8)
            for mask, fill, own in zip(masks, fill_CSS3, s.pictures, strict=True)
        ]
        for masks, s in zip(under, scenes, strict=True)
    ]


def chosen(score_BCHW: np.ndarray) -> np.ndarray:
    """The `COVERED` patches of each scene with the highest scores, boolean."""
    flat = score_BCHW.reshape(len(score_BCHW), -1)
    found = np.zeros(flat.shape, bool)
    np.put_along_axis(found, np.argsort(-flat, axis=1)[:, :COVERED], True, axis=1)
    return found.reshape(score_BCHW.shape)


def occlusion(driver: Driver, scenes: list[Scene]) -> dict[str, Any]:
    """How far the chunk moves when patches are covered: the hottest, as many others, and as many that show a cube."""
    task, draw = make_task("reach"), np.random.default_rng(0)
    told = [task.instruction(s.layout.target, s.layout.phrase) for s in scenes]
    plain = ask(driver, scenes, told)
    heat = plain.heat_GBCHW.mean(axis=0)
    hottest, noise = chosen(heat), [draw.random(heat.shape) for _ in range(DRAWS)]
    usual = np.stack([np.mean([s.pictures[c] for s in scenes], axis=0) for c in range(len(CAMERAS))])
    cubes = {
        name: np.stack([s.patches(heat.shape[-1], getattr(s.layout, name)) for s in scenes])
        for name in ("target", "other")
    }
    found: dict[str, Any] = {}
    for fill, pixels in {"black": np.zeros_like(usual), "the usual picture": usual}.items():

        def move(which: np.ndarray, pixels: np.ndarray = pixels) -> np.ndarray:
            return moved(ask(driver, scenes, told, covered(scenes, which, pixels)).chunk_BTA, plain.chunk_BTA)

        hot = move(hottest)
        random = np.mean([move(chosen(np.where(hottest, -1.0, x))) for x in noise], axis=0)
        found[fill] = {
            "hottest": mean(hot), "random others": mean(random), "coldest": mean(move(chosen(-heat))),
            **{f"patches of the {name} cube": mean(move(which)) for name, which in cubes.items()},
            "hottest moves it more": rate(hot > random), "ratio": float(hot.mean() / random.mean()),
        }  # fmt: skip
    found["patches of a cube"] = {name: float(which.sum(axis=(1, 2, 3)).mean()) for name, which in cubes.items()}
    return found


# --- a deaf policy ----------------------------------------------------------------------------------------------


def deafened(folder: Path, root: Path, output: Path, steps: int) -> Path:
    """The policy after more training, in which each sample has the words of another one. Returns its checkpoint."""
    driver = Driver(folder, 0)
    policy, config = driver.policy, driver.policy.config
    chunks = resolve_delta_timestamps(config, LeRobotDatasetMetadata("local/virtual_so100", root=root))
    dataset = LeRobotDataset("local/virtual_so100", root=root, delta_timestamps=chunks)
    draw = torch.Generator().manual_seed(0)
    order = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=16 * steps, generator=draw)
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=4e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-4, total_steps=steps, pct_start=0.1)
    for step, batch in enumerate(torch.utils.data.DataLoader(dataset, 16, sampler=order)):
        batch["task"] = [batch["task"][i] for i in torch.randperm(len(batch["task"]), generator=draw)]
        loss, _ = policy.forward(driver.pre(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        policy.update()
        if step % 100 == 0:
            print(f"deaf: step {step}, loss {loss.item():.4f}", flush=True)
    policy.eval().save_pretrained(output)
    driver.pre.save_pretrained(output)
    driver.post.save_pretrained(output)
    return output


# --- the report -------------------------------------------------------------------------------------------------


LOOKS = "heat", "told", "target", "other", "third", "chance", "any cube", "chance", "target hotter than other"
COVERS = "covered with", "hottest", "random others", "coldest", "target's", "other's", "hottest moves it more, %"


def header(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def percent(row: dict[str, Any]) -> str:
    """A rate as the page's tables have it."""
    low, high = row["interval_95"]
    return f"{100 * row['hits'] / row['of']:.0f} ({100 * low:.0f} – {100 * high:.0f})"


def tables(name: str, found: dict[str, Any]) -> str:
    """The page's tables of one policy."""
    lines = [f"\n{name}: how often the hottest patch is one of a cube's, %", "", *header(LOOKS)]
    for told in ("told the target", "told another cube", "always told red"):
        for sight, row in found["looking"][told]["sights"].items():
            for view in ("both", *CAMERAS) if sight == "all layers" else ("both",):
                cells = [percent(row[cube][view]["hottest"]) for cube in ("target", "other", "third")]
                cells += [f"{100 * row['target'][view]['chance']:.0f}", percent(row["any"][view]["hottest"])]
                cells += [f"{100 * row['any'][view]['chance']:.0f}"]
                cells += [percent(row["target hotter than other"]) if view == "both" else ""]
                lines.append(f"| {sight}, {view} | {told} | {' | '.join(cells)} |")
    lines += ["", *header(COVERS)]
    names = ("hottest", "random others", "coldest", "patches of the target cube", "patches of the other cube")
    for fill in ("black", "the usual picture"):
        row = found["occlusion"][fill]
        cells = [f"{row[x]['mean']:.3f} ± {row[x]['half_95']:.3f}" for x in names]
        lines.append(f"| {fill} | {' | '.join(cells)} | {percent(row['hottest moves it more'])} |")
    moves = found["looking"]["chunk moves with the words"]
    colour = found["looking"]["told the target"]["colour's part of the words"]
    shares = ", ".join(f"{k} {v:.0%}" for k, v in found["looking"]["told the target"]["shares"].items())
    lines += [
        "",
        f"The chunk moves by {moves['mean']:.3f} ± {moves['half_95']:.3f} with the words. Attention: {shares}. "
        f"Of the words, the colour gets {colour['mean']:.1%} ± {colour['half_95']:.1%}.",
    ]
    return "\n".join(lines)


def draw_picture(driver: Driver, scenes: list[Scene], path: Path) -> None:
    """The first scenes, told the target and then another cube: both cameras with heat, and the named cube's box."""
    task, columns = make_task("reach"), []
    for name in ("target", "other"):
        told = [task.instruction(getattr(s.layout, name), s.layout.phrase) for s in scenes]
        heat = ask(driver, scenes, told).heat_GBCHW.mean(axis=0)
        for scene, own, sentence in zip(scenes, heat, told, strict=True):
            columns.append(drawn(scene, own, sentence, getattr(scene.layout, name)))
    width, height = columns[0].size
    whole = Image.new("RGB", (2 * width, len(scenes) * height), "white")
    for i, column in enumerate(columns):
        whole.paste(column, (i // len(scenes) * width, i % len(scenes) * height))
    whole.save(path, optimize=True)


def drawn(scene: Scene, heat_CHW: np.ndarray, told: str, cube: str) -> Image.Image:
    """Both pictures of a scene under their heat, below the words; a white box is around the named cube."""
    side = scene.large[0].shape[0]
    frame = Image.new("RGB", (len(CAMERAS) * (side + 4) + 12, side + 28), "white")
    for c, (picture, heat) in enumerate(zip(scene.large, heat_CHW, strict=True)):
        spread = on_picture(torch.from_numpy(heat), SIDE // len(heat), SIDE, side, side).numpy()
        layer = Image.fromarray(tint(spread, float(heat_CHW.max())))
        both = Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer).convert("RGB")
        box = [side * x for x in scene.boxes[cube][c]]
        ImageDraw.Draw(both).rectangle(box, outline="white", width=2)
        frame.paste(both, (c * (side + 4), 24))
    ImageDraw.Draw(frame).text((side, 12), f"“{told}”", "black", ImageFont.load_default(15), anchor="mm")
    return frame


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy that make demo trained")
    parser.add_argument("--deafen", type=Path, help="the demo's dataset, to make a deaf policy with")
    parser.add_argument("--steps", type=int, default=DEAF_STEPS, help="training steps of the deaf policy")
    parser.add_argument("--scenes", type=int, default=100, help="unseen scenes (default: 100)")
    parser.add_argument("--seed", type=int, default=1000, help="first scene (default: 1000, as make demo)")
    parser.add_argument("--output", type=Path, default=Path("outputs/attention"), help="folder of JSON and picture")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    policies = {"trained": options.policy}
    deaf = options.output / "deaf"
    if options.deafen is not None and not deaf.exists():
        deafened(options.policy, options.deafen, deaf, options.steps)
    if deaf.exists():
        policies["deaf"] = deaf
    scenes, found = scenes_of(options.scenes, options.seed), {}
    for name, folder in policies.items():
        driver = Driver(folder, options.scenes)
        found[name] = {"looking": looking(driver, scenes), "occlusion": occlusion(driver, scenes)}
        print(tables(name, found[name]), flush=True)
        draw_picture(driver, scenes[:SHOWN], options.output / f"{name}.png")
    (options.output / "attention.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

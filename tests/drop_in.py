"""LeRobot's commands with every start and every set of cameras, run with this plugin and with LeRobot's own π₀.

    python tests/drop_in.py FOLDER          prints the table of docs/drop_in.md
    python tests/drop_in.py FOLDER write    and puts it there

A cell of the table is a command of LeRobot, run through its own `main` with small networks. Its answer is which camera
reached which slot of the network, or that the command refused. `meant` says what is right. A process can only have one
π₀, so three processes do the work: the first makes this plugin's checkpoints, the second makes LeRobot's and
runs LeRobot's cells, the third runs ours.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "drop_in.md"
BEGIN, END = "<!-- table: tests/drop_in.py -->", "<!-- end of table -->"

SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""Cameras of all checkpoints here, in the order of their slots; the names are those of lerobot/pi0_base."""

CAMERAS = (*SLOTS, "top", "front", "wrist", "side")
DIMS, SIDE, LEVEL, APART = 6, 32, 25, 30
"""Joints; pixels of a picture's side; mean of the first camera's pictures, of 255, and from one camera to the next."""


class Cameras(NamedTuple):
    """A column of the table: cameras of a dataset, an environment or a robot, and LeRobot's `--rename_map`."""

    names: tuple[str, ...]
    renamed: dict[str, str] = {}

    def option(self) -> list[str]:
        names = {f"observation.images.{a}": f"observation.images.{b}" for a, b in self.renamed.items()}
        return [f"--rename_map={json.dumps(names)}"] if names else []


BASE, LEFT, RIGHT = SLOTS
MAP = {"front": BASE, "wrist": LEFT, "side": RIGHT}
COLUMNS = {
    "same names": Cameras(SLOTS),
    "other order": Cameras((RIGHT, BASE, LEFT)),
    "fewer": Cameras((BASE, RIGHT)),
    "more": Cameras(("top", *SLOTS)),
    "renamed": Cameras(("wrist", "front", "side"), MAP),
    "renamed, fewer": Cameras(("side", "front"), {"front": BASE, "side": RIGHT}),
    "renamed, more": Cameras(("wrist", "top", "front", "side"), MAP),
    "other names, no map": Cameras(("wrist", "front", "side")),
}

PATH, PRETRAINED, RESUME = "train --policy.path", "train --policy.pretrained_path", "train, then --resume"
EVAL, ROLLOUT, CHECK = "eval", "rollout", "lerobot-pi0 check"

SCRATCH, PI0_BASE, OURS, THEIRS = "scratch", "pi0_base", "own", "built-in's"
TUNED, ADAPTER, THEIR_ADAPTER = "built-in's of pi0_base", "adapter", "built-in's adapter"
CHECKPOINTS = (OURS, THEIRS, TUNED, ADAPTER, THEIR_ADAPTER)
ROWS = [
    *((PATH, start) for start in (PI0_BASE, *CHECKPOINTS)),
    *((PRETRAINED, start) for start in (SCRATCH, PI0_BASE, *CHECKPOINTS)),
    *((RESUME, start) for start in (SCRATCH, PI0_BASE)),
    *((EVAL, start) for start in CHECKPOINTS),
    *((ROLLOUT, start) for start in CHECKPOINTS),
    *((CHECK, start) for start in (PI0_BASE, *CHECKPOINTS)),
]

Answer = dict[str, Any]
"""{"slots": names of the dataset's cameras by slot, None where it is empty}, or {"error": what was said}."""


def meant(command: str, start: str, cameras: Cameras) -> list[str | None] | None:
    """Which camera belongs into which slot; None if LeRobot itself refuses, with any policy.

    With `--policy.path` and on a robot the policy has the checkpoint's cameras. With `--policy.type=pi0` it has the
    dataset's: first those that the checkpoint knows, in the checkpoint's order, then the others.
    """
    target = {cameras.renamed.get(name, name): name for name in cameras.names}
    if start == SCRATCH:  # a --rename_map needs a checkpoint
        return None if cameras.renamed else list(cameras.names)
    known = [target.get(slot) for slot in SLOTS]
    fits = bool(cameras.renamed) or set(target) <= set(SLOTS) or set(SLOTS) <= set(target)
    if command == PRETRAINED:
        return [name for name in known if name] + [name for key, name in target.items() if key not in SLOTS]
    if start == PI0_BASE and not fits:  # a base for any robot takes the dataset's cameras
        return list(cameras.names)
    return known if fits else None


# --- the table ----------------------------------------------------------------------------------------------

SHORT = {BASE: "base", LEFT: "left", RIGHT: "right", None: "–"}


def cell_text(slots: list[str | None] | None) -> str:
    return "refused" if slots is None else ", ".join(SHORT.get(name, str(name)) for name in slots)


def table(ours: dict[str, Answer], theirs: dict[str, Answer]) -> str:
    """The table in Markdown; different results of LeRobot's own π₀ are in brackets."""
    lines = [f"| command | start | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 2)]
    for command, start in ROWS:
        cells = []
        for column in COLUMNS:
            key = key_of(command, start, column)
            mine = cell_text(ours[key].get("slots"))
            other = theirs.get(key)
            text = mine if other is None else "random weights" if "random" in other else cell_text(other.get("slots"))
            cells.append(mine if text == mine else f"{mine} ({text})")
        lines.append(f"| {command} | {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def key_of(command: str, start: str, column: str) -> str:
    return f"{command} | {start} | {column}"


# --- the commands -------------------------------------------------------------------------------------------


def picture(name: str, seed: int = 0) -> Any:
    """A picture whose mean says which camera took it."""
    import numpy as np

    level = LEVEL + APART * CAMERAS.index(name)
    draw = np.random.default_rng(seed)
    blocks = draw.integers(level - 20, level + 21, (SIDE // 2, SIDE // 2, 3))
    return np.kron(blocks, np.ones((2, 2, 1))).astype("uint8")


def camera_of(image: Any) -> str:
    """The camera that took a picture in [-1, 1], of any size."""
    return CAMERAS[round((float((image.float().mean() + 1) * 127.5) - LEVEL) / APART)]


class Seen:
    """Notes what the network is given: by slot of the policy's config, the camera whose picture it is."""

    def __init__(self) -> None:
        self.slots: list[str | None] | None = None

    def note(self, keys: list[str], present: list[str], images: list[Any]) -> None:
        found = {key: camera_of(image) for key, image in zip(present, images, strict=True)}
        assert list(found) == [key for key in keys if key in found], "pictures in another order than the config's slots"
        self.slots = [found.get(key) for key in keys]

    def listen(self) -> None:
        """Note what either π₀ is given from now on."""
        from lerobot.policies.pi0 import modeling_pi0 as builtin

        from lerobot_pi0.inputs.observation import ObservationMaker

        assemble, preprocess = ObservationMaker.assemble, builtin.PI0Policy._preprocess_images

        def noted(maker: Any, cameras: dict, *args: Any, **kwargs: Any) -> Any:
            made = assemble(maker, cameras, *args, **kwargs)
            self.note(list(maker.config.image_features), list(cameras), list(made.images_BNCHW[0]))
            return made

        def noted_too(policy: Any, batch: dict) -> Any:
            images, masks = preprocess(policy, batch)
            keys = list(policy.config.image_features)
            present = [key for key in keys if key in batch]
            self.note(keys, present, [image[0] for image in images[: len(present)]])
            return images, masks

        ObservationMaker.assemble = noted  # type: ignore[method-assign]
        builtin.PI0Policy._preprocess_images = noted_too


class Cells:
    """The cells of one π₀, in the folder that holds the datasets and the checkpoints to start from."""

    LOOP: ClassVar = ["--batch_size=2", "--num_workers=0", "--log_freq=1", "--wandb.enable=false"]
    CPU: ClassVar = ["--policy.device=cpu", "--policy.push_to_hub=false"]
    NEW: ClassVar = ["--policy.type=pi0", "--policy.chunk_size=8", "--policy.n_action_steps=4",
                     "--policy.num_inference_steps=2"]  # fmt: skip

    def __init__(self, folder: Path, who: str) -> None:
        self.folder, self.who, self.seen = folder, who, Seen()
        self.seen.listen()
        self.random = False
        """Whether LeRobot's π₀ said that it goes on with random weights."""

    def dataset(self, column: str) -> list[str]:
        return ["--dataset.repo_id=local/data", f"--dataset.root={self.folder / 'data' / column}"]

    def start(self, name: str) -> Path:
        """The checkpoint of a start's name."""
        return self.folder / "starts" / name / "checkpoints" / "last" / "pretrained_model"

    def run(self, main: Callable[[], Any], *arguments: str | Path) -> Any:
        """A command, by its `main`; raises what it raises."""
        self.seen.slots, said = None, io.StringIO()
        sys.argv = ["command", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(said):
                return main()
        finally:
            lost = (
                "Could not load state dict",
                "without loading pretrained weights",
                "Missing keys",
                "Unexpected keys",
            )
            self.random = any(words in said.getvalue() for words in lost)

    def train(self, *arguments: str, column: str, out: Path, save: bool = False, steps: int = 1) -> None:
        from lerobot.scripts.lerobot_train import main

        saving = [f"--save_checkpoint={str(save).lower()}", f"--output_dir={out}", f"--steps={steps}"]
        self.run(main, *self.dataset(column), *self.LOOP, *self.CPU, *arguments, *saving)

    def answer(self, command: str, start: str, column: str) -> Answer:
        """What a cell's command does."""
        do = {PATH: self._path, PRETRAINED: self._pretrained, RESUME: self._resume, EVAL: self._eval,
              ROLLOUT: self._rollout, CHECK: self._check}[command]  # fmt: skip
        print("CELL", command, start, column, file=sys.stderr, flush=True)
        self.random = False
        try:
            do(start, column, self.folder / self.who / command.replace(" ", "_") / start / column)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        return {"slots": self.seen.slots} | ({"random": True} if self.random else {})

    def _path(self, start: str, column: str, out: Path) -> None:
        options = [f"--policy.path={self.start(start)}", *COLUMNS[column].option()]
        self.train(*options, column=column, out=out, save=start == PI0_BASE)

    def _pretrained(self, start: str, column: str, out: Path) -> None:
        options = [*self.NEW, *COLUMNS[column].option()]
        if start != SCRATCH:
            options.append(f"--policy.pretrained_path={self.start(start)}")
        if start in (ADAPTER, THEIR_ADAPTER):
            options.append("--policy.use_peft=true")
        self.train(*options, column=column, out=out, save=start == SCRATCH)

    def _resume(self, start: str, column: str, out: Path) -> None:
        """Go on with the run of the cell that began it."""
        from lerobot.scripts.lerobot_train import main

        first = PRETRAINED if start == SCRATCH else PATH
        last = self.folder / self.who / first.replace(" ", "_") / start / column / "checkpoints" / "last"
        self.run(main, "--resume=true", f"--config_path={last}/pretrained_model/train_config.json", "--steps=2")

    def _eval(self, start: str, column: str, out: Path) -> None:
        from lerobot.scripts.lerobot_eval import main

        self.run(main, f"--policy.path={self.start(start)}", "--policy.device=cpu", "--env.type=pictures",
                 f"--env.cameras={json.dumps(list(COLUMNS[column].names))}", "--eval.n_episodes=1",
                 "--eval.batch_size=1", "--eval.use_async_envs=false", f"--output_dir={out}",
                 *COLUMNS[column].option())  # fmt: skip

    def _rollout(self, start: str, column: str, out: Path) -> None:
        from lerobot.scripts.lerobot_rollout import main

        self.run(main, "--strategy.type=base", f"--policy.path={self.start(start)}", "--policy.device=cpu",
                 "--device=cpu", "--robot.type=pictures", f"--robot.calibration_dir={self.folder}",
                 f"--robot.names={json.dumps(list(COLUMNS[column].names))}", "--task=push", "--fps=100",
                 "--duration=60", "--return_to_initial_position=false", *COLUMNS[column].option())  # fmt: skip

    def _check(self, start: str, column: str, out: Path) -> None:
        """The slots that the command would train, which it tells; its errors are an error."""
        from lerobot_pi0.tools import main

        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            sys.argv = ["lerobot-pi0", "check", f"--policy.path={self.start(start)}", *self.dataset(column),
                        *COLUMNS[column].option(), "--json=true"]  # fmt: skip
            main()
        report = json.loads(said.getvalue())
        if errors := [x["message"] for x in report["findings"] if x["grade"] == "error"]:
            raise ValueError("; ".join(errors))


# --- what they run on ---------------------------------------------------------------------------------------


def write_datasets(folder: Path) -> None:
    """A dataset for each column."""
    import numpy as np
    from lerobot.datasets import LeRobotDataset

    for column, cameras in COLUMNS.items():
        vector = {"dtype": "float32", "shape": (DIMS,), "names": [f"joint_{i}.pos" for i in range(DIMS)]}
        image = {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
        features = {f"observation.images.{name}": image for name in cameras.names}
        features |= {"observation.state": vector, "action": vector}
        data = LeRobotDataset.create("local/data", 10, features, root=folder / column, use_videos=False)
        draw = np.random.default_rng(0)
        for episode in range(2):
            for frame in range(10):
                row = {f"observation.images.{x}": picture(x, 10 * episode + frame) for x in cameras.names}
                vectors = {key: draw.normal(0, 9, DIMS).astype("float32") for key in ("observation.state", "action")}
                data.add_frame(row | vectors | {"task": "push"})
            data.save_episode()
        data.finalize()


def write_base(folder: Path) -> None:
    """A checkpoint with the features and processors of lerobot/pi0_base: padded, for any robot, no statistics."""
    from lerobot.configs import FeatureType, PolicyFeature

    from lerobot_pi0 import PI0Config, PI0Policy, make_pi0_pre_post_processors

    cameras = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for name in SLOTS}
    policy = PI0Policy(PI0Config(
        device="cpu", push_to_hub=False, chunk_size=8, n_action_steps=4, num_inference_steps=2,
        input_features=cameras | {"observation.state": PolicyFeature(FeatureType.STATE, (32,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (32,))},
    ))  # fmt: skip
    policy.save_pretrained(folder)
    known = {"mean": [0.0] * 32, "std": [1.0] * 32}
    for pipeline in make_pi0_pre_post_processors(policy.config, dict.fromkeys(("observation.state", "action"), known)):
        for step in pipeline.steps:
            if hasattr(step, "stats"):
                step.stats, step.features, step._tensor_stats = {}, {}, {}
        pipeline.save_pretrained(folder)
    for file in folder.glob("lerobot_pi0*.json"):
        file.unlink()


def make_starts(cells: Cells) -> None:
    """This π₀'s checkpoints: of a run from scratch, of one from pi0_base, and an adapter of pi0_base."""
    ours = cells.who == "ours"
    base, column = cells.start(PI0_BASE), "same names"
    if ours:
        write_datasets(cells.folder / "data")
        write_base(base)
    names = (OURS, ADAPTER) if ours else (THEIRS, THEIR_ADAPTER, TUNED)
    options = (
        [*cells.NEW],
        [f"--policy.path={base}", "--peft.method_type=LORA", "--peft.r=4"],
        [f"--policy.path={base}"],
    )
    for name, given in zip(names, options, strict=False):
        cells.train(*given, column=column, out=cells.folder / "starts" / name, save=True)
        assert not cells.random, f"{name}: random weights"


def register() -> None:
    """Let LeRobot know an environment and a robot whose cameras are options."""
    import gymnasium
    import numpy as np
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.envs import EnvConfig

    class Pictures(gymnasium.Env):
        """Shows what each camera takes, and has no goal."""

        metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
        action_space = joints = gymnasium.spaces.Box(-np.inf, np.inf, (DIMS,), np.float32)
        task_description = task = "push"
        _max_episode_steps = 2

        def __init__(self, cameras: list[str], **_: Any) -> None:
            self.cameras, self.steps = cameras, 0
            image = gymnasium.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
            pixels = gymnasium.spaces.Dict(dict.fromkeys(cameras, image))
            self.observation_space = gymnasium.spaces.Dict({"pixels": pixels, "agent_pos": self.joints})

        def observation(self) -> dict:
            return {"pixels": {x: picture(x) for x in self.cameras}, "agent_pos": np.zeros(DIMS, np.float32)}

        def render(self) -> Any:
            return picture("top")

        def reset(self, **_: Any) -> tuple[dict, dict]:
            self.steps = 0
            return self.observation(), {"is_success": False}

        def step(self, action: Any) -> tuple:
            self.steps += 1
            return self.observation(), 0.0, self.steps == 2, False, {"is_success": False}

    gymnasium.register("gym_pictures/any", Pictures)

    @EnvConfig.register_subclass("pictures")
    @dataclass
    class PicturesEnv(EnvConfig):
        task: str = "any"
        cameras: list[str] = field(default_factory=list)

        def __post_init__(self) -> None:
            images = {f"pixels/{name}": PolicyFeature(FeatureType.VISUAL, (SIDE, SIDE, 3)) for name in self.cameras}
            self.features = images | {"action": PolicyFeature(FeatureType.ACTION, (DIMS,)),
                                      "agent_pos": PolicyFeature(FeatureType.STATE, (DIMS,))}  # fmt: skip
            self.features_map = {"action": "action", "agent_pos": "observation.state"}
            self.features_map |= {f"pixels/{name}": f"observation.images.{name}" for name in self.cameras}

        @property
        def gym_kwargs(self) -> dict:
            return {"cameras": self.cameras}

    import picture_robot  # noqa: F401  LeRobot finds the class of a robot beside its config


# --- processes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_networks() -> Iterator[None]:
    """Make both π₀ small, and replace PaliGemma's gated tokenizer by a byte tokenizer."""
    import pytest
    import transformers
    from conftest import set_presets
    from presets import Size

    from lerobot_pi0.configuration_pi0 import PALIGEMMA_TOKENIZER
    from lerobot_pi0.network.sizes import GemmaSize, PaliGemmaSize, VisionSize

    vision = VisionSize(width=16, depth=1, mlp_dim=16, heads=2, patch_size=56, image_size=224)
    vlm = PaliGemmaSize(vision, GemmaSize(width=32, depth=2, mlp_dim=32, heads=8, head_dim=8), vocab_size=512)
    fetch = transformers.AutoTokenizer.from_pretrained

    def from_pretrained(name: str, *args: Any, **kwargs: Any) -> Any:
        return transformers.ByT5Tokenizer() if name == PALIGEMMA_TOKENIZER else fetch(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        set_presets(patch, Size(vlm, GemmaSize(width=16, depth=2, mlp_dim=16, heads=8, head_dim=8)))
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
        yield


def work(folder: str, who: str, job: str, answers: str) -> None:
    """The work of one of the processes."""
    with small_networks():
        register()
        cells, found = Cells(Path(folder), who), {}
        if who == "theirs" or job == "starts":
            make_starts(cells)
        if job == "cells":
            for command, start in ROWS:
                if who == "theirs" and command == CHECK:
                    continue
                found |= {key_of(command, start, x): cells.answer(command, start, x) for x in COLUMNS}
        Path(answers).write_text(json.dumps(found, indent=1))


def process(folder: Path, who: str, job: str) -> dict[str, Answer]:
    """Run a process, and return its answers."""
    out = folder / f"{who}_{job}.json"
    environment = os.environ | {"LEROBOT_PI0_TAKEOVER": "1" if who == "ours" else "0", "HF_HUB_OFFLINE": "1"}
    code = "import sys, drop_in; drop_in.work(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), who, job, str(out)]
    with out.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, stdout=log, stderr=log)
    assert done.returncode == 0, out.with_suffix(".log").read_text()[-6000:]
    return json.loads(out.read_text())


def answers(folder: Path) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """The answers of all cells, with this plugin and with LeRobot's own π₀."""
    process(folder, "ours", "starts")
    theirs = process(folder, "theirs", "cells")
    return process(folder, "ours", "cells"), theirs


def made_table(page: str) -> str:
    """The table that a page holds."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def put_table(page: str, made: str) -> str:
    """The page with this table in place of its own."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def main(folder: Path, write: bool) -> None:
    made = table(*answers(folder))
    print(made)
    if write:
        PAGE.write_text(put_table(PAGE.read_text(), made))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), "write" in sys.argv[2:])

"""What `lerobot-pi0 check` looks at, one function per question; a new question is a line in `CHECKS`.

Axes: N frames, D dims of state or action, C cameras or channels.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.configs import NormalizationMode
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.compute_stats import compute_relative_action_stats
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import RelativeActionsProcessorStep
from lerobot.robots import Robot
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from tqdm import tqdm

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointError
from ..configuration_pi0 import PI0Config
from ..inputs.observation import ObservationMaker
from ..inputs.statistics import NEAR_CONSTANT, STATISTICS, check_relative_statistics, check_statistics
from . import ToolError
from .data import Columns, dim_names, some
from .show import network_parameters

ERROR, WARNING, FINE = "error", "warning", "fine"

RECOMPUTE = "lerobot-edit-dataset --operation.type=recompute_stats makes them anew"
TOLERANCE_S = 1e-4
"""By how much LeRobot lets a time stamp miss its frame, in seconds."""

DEGREES_PER_RADIAN = 180 / np.pi
GRID = 32
STANDING = 0.02
"""A picture stands still if no cell of a grid of that many by that many changes by more than this, of a range of 1."""

OUTLIER = 10.0
"""A normalised value beyond this is called an outlier."""


class Finding(NamedTuple):
    """One answer; `remedy` is empty where nothing is to be done."""

    grade: str
    about: str
    message: str
    remedy: str = ""


class Trained(NamedTuple):
    """What the weights to start from were trained on; empty for a policy from scratch."""

    source: str | None
    config: PI0Config | None
    stats: dict[str, dict[str, Any]]
    tokenizer: Any
    problem: str | None


class Look(NamedTuple):
    """What was seen of one camera: size, range, and by how much some cell differs from the frame before."""

    height_width: tuple[int, int]
    low: float
    high: float
    change: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    moving: np.ndarray


@dataclass
class Subject:
    """Policy, dataset and robot that are checked against each other."""

    config: PI0Config
    keeps_features: bool
    trained: Trained
    dataset: LeRobotDataset
    all_episodes: bool
    columns: Columns
    robot: Robot | None = None
    rename_map: dict[str, str] = field(default_factory=dict)
    images: int = 600
    card_gb: float | None = None
    batch_size: int = 8

    @cached_property
    def stats(self) -> dict[str, dict[str, Any]]:
        return self.dataset.meta.stats or {}

    @cached_property
    def cameras(self) -> dict[str, str]:
        """The dataset's cameras: their keys, by the keys that the policy knows them under."""
        return {self.rename_map.get(key, key): key for key in self.dataset.meta.camera_keys}

    @cached_property
    def looks(self) -> dict[str, Look]:
        return look_at_images(self)

    def vectors(self) -> Iterator[tuple[str, np.ndarray, NormalizationMode]]:
        """State and actions as they are normalised: key, values (N, D), mode."""
        actions = self.columns.action_ND
        if self.config.use_relative_actions:
            mask = relative_mask(self.config, actions.shape[1], self.columns.state_ND.shape[1])
            actions = actions - np.where(mask, self.columns.state_ND[:, : actions.shape[1]], 0)
        for key, kind, values in ((OBS_STATE, "STATE", self.columns.state_ND), (ACTION, "ACTION", actions)):
            yield key, values, self.config.normalization_mapping.get(kind, NormalizationMode.IDENTITY)


def relative_mask(config: PI0Config, dims: int, state_dims: int) -> np.ndarray:
    """Which dims of the actions are relative to the state."""
    step = RelativeActionsProcessorStep(True, config.relative_exclude_joints, config.action_feature_names)
    return np.array(step._build_mask(dims)) & (np.arange(dims) < state_dims)


def array(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.float64).reshape(-1)


# --- cameras ------------------------------------------------------------------------------------------------


def cameras(subject: Subject) -> Iterable[Finding]:
    """Which camera goes into which slot, and which are missing."""
    expected = [key for key in subject.config.image_features if "empty_camera" not in key]
    missing = [key for key in expected if key not in subject.cameras]
    surplus = [key for key in subject.cameras if key not in expected]
    rename = "give --rename_map='{DATASET_KEY: POLICY_KEY}', here and to lerobot-train"
    if not subject.cameras:
        yield Finding(
            ERROR, "cameras", "the dataset has no camera", "π₀ needs at least one: record with --robot.cameras"
        )
    if missing and surplus:
        message = f"the policy knows {some(expected)}, the dataset has {some(list(subject.cameras))}"
        yield Finding(ERROR, "cameras", f"{message}: lerobot-train refuses this", rename)
    elif missing:
        yield Finding(
            WARNING, "cameras", f"{some(missing)} of the policy are not in the dataset", f"record them, or {rename}"
        )
    elif surplus:
        yield Finding(WARNING, "cameras", f"{some(surplus)} of the dataset are not seen by the policy", rename)
    trained = list(subject.trained.config.image_features) if subject.trained.config else []
    slots = [key for key in expected if key in subject.cameras]
    for i, key in enumerate(slots):
        was = f" (trained as {trained[i]})" if i < len(trained) and trained[i] != key else ""
        yield Finding(FINE, "cameras", f"slot {i + 1}{was} ← {subject.cameras[key]}")
    yield from wrist_in_front(slots, trained)


def wrist_in_front(slots: list[str], trained: list[str]) -> Iterable[Finding]:
    """Slots are filled in order: a wrist camera where the weights expect the scene, by the names."""
    wrist = [any(word in key.lower() for word in ("wrist", "hand", "gripper")) for key in slots]
    was = [any(word in key.lower() for word in ("wrist", "hand", "gripper")) for key in trained[: len(slots)]]
    if trained and slots != trained[: len(slots)] and any(a != b for a, b in zip(wrist, was, strict=False)):
        yield Finding(
            WARNING, "cameras", f"the order {some(slots)} does not suit the weights' {some(trained)}: wrist and scene "
            "cameras are mixed up", "order the cameras as the weights had them when recording, or rename them",
        )  # fmt: skip


def pictures_of_training(subject: Subject) -> Iterable[Finding]:
    """Whether each camera's pictures are most like those the weights knew under its name, and its colours too."""
    ours: dict[str, np.ndarray] = {}
    theirs: dict[str, np.ndarray] = {}
    for key, own in subject.cameras.items():
        mine, known = signature(subject.stats.get(own, {})), signature(subject.trained.stats.get(key, {}))
        if mine is not None and known is not None:
            ours[key], theirs[key] = mine, known
    if not (keys := list(ours)):
        return
    order = permutation(np.stack([ours[key] for key in keys]), np.stack([theirs[key] for key in keys]))
    if order is not None:
        pairs = [
            f"{key} looks like the weights' {keys[j]}" for j, key in zip(order, keys, strict=True) if keys[j] != key
        ]
        yield Finding(WARNING, "cameras", f"swapped? {some(pairs)}", "look at both, then --rename_map or record anew")
    for key in keys:
        straight, reversed_ = ours[key].reshape(-1, 3), ours[key].reshape(-1, 3)[:, ::-1]
        reference = theirs[key].reshape(-1, 3)
        if clearly_less(np.abs(reversed_ - reference).mean(), np.abs(straight - reference).mean(), floor=0.02):
            yield Finding(WARNING, "colours", f"{key}: red and blue look exchanged", "record RGB, not BGR")
    yield Finding(FINE, "cameras", f"compared with the pictures that {subject.trained.source} was trained on")


def signature(stats: dict[str, Any]) -> np.ndarray | None:
    """Quantiles of a camera's colours (3 quantiles × 3 channels), in [0, 1]; None where there are none.

    Not mean and deviation: lerobot-train writes ImageNet's in their place.
    """
    names = ("q10", "q50", "q90")
    if any(name not in stats or array(stats[name]).size != 3 for name in names):
        return None
    return np.concatenate([array(stats[name]) for name in names])


def clearly_less(a: float, b: float, floor: float) -> bool:
    """Whether `a` explains the data, and `b` does not."""
    return b > floor and a < 0.25 * b


def permutation(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.02) -> list[int] | None:
    """The order in which rows of `ours` are rows of `theirs`, if it is clearly another one than theirs."""
    cost = np.abs(ours[:, None] - theirs[None]).mean(axis=2)
    best = cost.argmin(axis=1)
    if sorted(best) != list(range(len(best))) or (best == np.arange(len(best))).all():
        return None
    moved = np.flatnonzero(best != np.arange(len(best)))
    return best.tolist() if clearly_less(cost[moved, best[moved]].mean(), cost[moved, moved].mean(), floor) else None


def images(subject: Subject) -> Iterable[Finding]:
    """Resolution, range, and what does not change although the arm moves."""
    side = subject.config.image_size
    for key, look in subject.looks.items():
        yield from resolution(subject, key, look, side)
        if not (look.low >= -1e-3 and look.high <= 1 + 1e-3):
            message = f"{key} holds values from {look.low:.3g} to {look.high:.3g}, expected [0, 1]"
            yield Finding(ERROR, "images", message, "record 8-bit images; LeRobot divides them by 255")
        elif look.high < 0.1:
            message = f"{key} is black: its brightest value is {look.high:.3g} of 1"
            yield Finding(ERROR, "images", message, "divided by 255 twice, a lens cap, or exposure: record anew")
        elif look.high - look.low < 0.02:
            yield Finding(ERROR, "images", f"{key} shows one grey everywhere", "check the camera and record anew")
        else:
            yield from standing_pictures(subject, key, look)


def resolution(subject: Subject, key: str, look: Look, side: int) -> Iterable[Finding]:
    shape = tuple(subject.dataset.meta.features[key]["shape"])
    height, width = look.height_width
    if {height, width} - {*shape}:
        message = f"{key} is {height} × {width}, the dataset says {shape}"
        yield Finding(ERROR, "images", message, "the files are of another recording: restore or record anew")
    if max(height, width) < side:
        message = f"{key} is {height} × {width} and is enlarged to {side}: details are missing"
        yield Finding(WARNING, "images", message, f"record at {side} pixels or more")
    policy_key = subject.rename_map.get(key, key)
    trained = subject.trained.config.image_features.get(policy_key) if subject.trained.config else None
    if trained is not None and subject.keeps_features:
        ratios = width / height, trained.shape[-1] / trained.shape[-2]
        if trained.shape[-1] != trained.shape[-2] and abs(ratios[0] / ratios[1] - 1) > 0.1:
            message = f"{key} has the aspect {ratios[0]:.2f}, in training it had {ratios[1]:.2f}"
            yield Finding(WARNING, "images", message, "record at the shape of training")


def standing_pictures(subject: Subject, key: str, look: Look) -> Iterable[Finding]:
    """Frames that equal the one before although joints moved: a camera that hangs, or is slower than the fps."""
    moving = look.moving
    if not moving.any():
        return
    lively = np.quantile(look.change[moving], 0.9)
    same = moving & (look.change <= 0.05 * lively) if lively > STANDING else moving
    episodes, frames = look.episode, look.frame
    hangs = []
    for episode in np.unique(episodes):
        mine = episodes == episode
        start, length = longest_run(same[mine])
        if length >= min(10, max(3, mine.sum() // 2)):
            hangs.append(f"episode {episode} from frame {frames[mine][start]}")
            same &= ~mine
    if hangs:
        message = f"{key} is frozen while the joints move: {some(hangs)}"
        yield Finding(ERROR, "images", message, "delete these episodes (lerobot-edit-dataset) and check the camera")
    share = same.sum() / moving.sum()
    if share > 0.1:
        where = sorted({int(x) for x in episodes[same]})
        message = (
            f"{key}: {share:.0%} of the frames repeat the one before while the joints move (episodes {some(where)})"
        )
        yield Finding(
            WARNING,
            "images",
            message,
            f"the camera is slower than {subject.dataset.meta.fps} fps: lower one, or light the scene",
        )


def longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    return (int(starts[lengths.argmax()]), int(lengths.max())) if len(starts) else (0, 0)


def look_at_images(subject: Subject) -> dict[str, Look]:
    """Decode runs of consecutive frames, spread over the episodes."""
    columns, dataset = subject.columns, subject.dataset
    found: dict[str, list[tuple[float, int, int, bool]]] = {key: [] for key in dataset.meta.camera_keys}
    ranges: dict[str, list[tuple[float, float]]] = {key: [] for key in found}
    sizes: dict[str, tuple[int, int]] = {}
    spread = np.maximum(columns.state_ND.std(axis=0), 1e-9)
    rows = frames_to_look_at(columns.episode, subject.images)
    previous: dict[str, torch.Tensor] = {}
    last = -2
    for i in tqdm(rows, desc="images", disable=not found, leave=False):
        item = dataset[int(i)]
        joined = i == last + 1 and columns.episode[i] == columns.episode[last]
        for key in found:
            picture = item[key].float()
            picture = picture / 255 if item[key].dtype == torch.uint8 else picture
            sizes[key] = (picture.shape[-2], picture.shape[-1])
            ranges[key].append((float(picture.min()), float(picture.max())))
            small = F.adaptive_avg_pool2d(picture[None], GRID)[0]  # which evens out what a video codec adds
            if joined:
                step = np.abs(columns.state_ND[i] - columns.state_ND[last]) / spread
                change = float((small - previous[key]).abs().max())
                found[key].append((change, int(columns.episode[i]), int(columns.frame[i]), bool(step.max() > 0.05)))
            previous[key] = small
        last = i
    return {key: _look(sizes[key], ranges[key], found[key]) for key in sizes}


def _look(size: tuple[int, int], ranges: list[tuple[float, float]], found: list[tuple[float, int, int, bool]]) -> Look:
    low, high = np.array(ranges).T
    change, episode, frame, moving = zip(*found, strict=True) if found else ((), (), (), ())
    return Look(
        size, float(low.min()), float(high.max()), np.array(change), np.array(episode, int), np.array(frame, int),
        np.array(moving, bool),
    )  # fmt: skip


def frames_to_look_at(episode: np.ndarray, most: int) -> np.ndarray:
    """Row numbers: a run in each of some episodes, the runs at the beginning, middle and end in turn."""
    numbers = np.unique(episode)
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, max(1, min(len(numbers), most // 40))).astype(int))]
    length = most // len(chosen)
    rows = []
    for turn, number in enumerate(chosen):
        mine = np.flatnonzero(episode == number)
        start = max(0, len(mine) - length) * (turn % 3) // 2
        rows.append(mine[start : start + length])
    return np.concatenate(rows)


# --- joints -------------------------------------------------------------------------------------------------


def joints(subject: Subject) -> Iterable[Finding]:
    """Names and order of the joints: state against actions, dataset against weights and robot."""
    names = {key: dim_names(subject.dataset, key) for key in (OBS_STATE, ACTION)}
    config = subject.config
    for key, most, option in (
        (OBS_STATE, config.max_state_dim, "max_state_dim"),
        (ACTION, config.max_action_dim, "max_action_dim"),
    ):
        if len(names[key]) > most:
            message = f"{key} has {len(names[key])} dims, the network has room for {most}"
            yield Finding(ERROR, "dims", message, f"leave dims out, or train from scratch with a larger {option}")
        else:
            yield Finding(FINE, "joints", f"{key}: {', '.join(names[key])}")
    if sorted(names[OBS_STATE]) == sorted(names[ACTION]) and names[OBS_STATE] != names[ACTION]:
        message = "state and actions have the same joints in another order"
        yield Finding(WARNING, "joints", message, "record both in one order; relative actions need it")
    before = subject.trained.config
    if before is not None and before.output_features:
        grade = ERROR if subject.keeps_features else WARNING
        yield from compare_joints(names, before, subject.trained.source, grade)
    if subject.robot is not None:
        yield from compare_with_robot(subject, subject.robot, names)


def compare_joints(names: dict[str, list[str]], before: PI0Config, source: str | None, grade: str) -> Iterable[Finding]:
    other = (
        "to fine-tune for another robot, give --policy.type=pi0 --policy.pretrained_path=CHECKPOINT, not --policy.path"
    )
    features = {**(before.input_features or {}), **(before.output_features or {})}
    for key, found in names.items():
        dims = features[key].shape[0] if key in features else len(found)
        if dims not in (len(found), before.max_state_dim, before.max_action_dim):
            yield Finding(grade, "joints", f"{key} has {len(found)} dims, {source} has {dims}", other)
    expected, found = before.action_feature_names, names[ACTION]
    if expected and expected != found and len(expected) == len(found):
        what = "in another order" if sorted(expected) == sorted(found) else "other joints"
        message = f"{what} than {source}: {', '.join(found)}; there {', '.join(expected)}"
        yield Finding(
            grade, "joints", message, "record the joints in the weights' order: dims have no names in the network"
        )


def compare_with_robot(subject: Subject, robot: Robot, names: dict[str, list[str]]) -> Iterable[Finding]:
    """The robot's joints and cameras against the dataset's."""
    mine = list(robot.action_features)
    if mine != names[ACTION]:
        message = f"{robot.name} has the joints {', '.join(mine)}; the dataset {', '.join(names[ACTION])}"
        yield Finding(ERROR, "robot", message, "this dataset is of another robot, or of another order of joints")
    shapes = {f"{OBS_IMAGES}.{k}": v for k, v in robot.observation_features.items() if isinstance(v, tuple)}
    if missing := [key for key in subject.cameras if key not in shapes]:
        message = f"{robot.name} has no {some(missing)}, only {some(list(shapes)) or 'no camera'}"
        yield Finding(ERROR, "robot", message, "name --robot.cameras as in the dataset")
    for key, shape in shapes.items():
        recorded = tuple(subject.dataset.meta.features.get(key, {}).get("shape", shape))
        if None not in shape and sorted(recorded) != sorted(shape):
            yield Finding(
                WARNING, "robot", f"{key} is {shape} on {robot.name}, {recorded} in the dataset", "use one size"
            )
    if getattr(robot.config, "use_degrees", None) is False and np.abs(subject.columns.state_ND).max() > 101:
        message = f"{robot.name} speaks of -100 … 100, the dataset goes to {np.abs(subject.columns.state_ND).max():.0f}"
        yield Finding(ERROR, "robot", message, "the dataset is in degrees: set --robot.use_degrees=true")
    if mine == names[ACTION] and not missing:
        yield Finding(FINE, "robot", f"{robot.name}: joints and cameras are the dataset's")


def units(subject: Subject) -> Iterable[Finding]:
    """Degrees for radians, permuted joints, another robot: distributions against those of the weights' training."""
    pairs = [(OBS_STATE, subject.columns.state_ND)]
    if not subject.config.use_relative_actions:  # the weights' statistics of relative actions are no positions
        pairs.append((ACTION, subject.columns.action_ND))
    for key, values in pairs:
        stats = subject.trained.stats.get(key, {})
        if "mean" in stats and array(stats["mean"]).size == values.shape[1]:
            yield compare_distributions(key, values, stats, dim_names(subject.dataset, key), subject.trained.source)


def compare_distributions(
    key: str, values_ND: np.ndarray, stats: dict[str, Any], names: list[str], source: str | None
) -> Finding:
    """The first explanation of how far the values are from those that the weights know."""
    mean, std = array(stats["mean"]), np.maximum(array(stats["std"]), 1e-9)
    own_mean, own_std = values_ND.mean(axis=0), np.maximum(values_ND.std(axis=0), 1e-9)
    ratio = own_std / std
    for what, factor in (
        ("degrees where the weights know radians", DEGREES_PER_RADIAN),
        ("radians where the weights know degrees", 1 / DEGREES_PER_RADIAN),
    ):
        if are_near(ratio, factor):
            message = f"{key} looks like {what} (spread × {np.median(ratio):.3g})"
            return Finding(WARNING, "units", message, "convert the dataset, or set the robot to the weights' unit")
    order = permutation(np.stack([own_mean, own_std], 1) / std.mean(), np.stack([mean, std], 1) / std.mean(), 0.3)
    if order is not None:
        moved = [f"{names[i]} like {names[j]}" for i, j in enumerate(order) if i != j]
        message = f"{key}: joints are distributed as others were in training ({some(moved)})"
        return Finding(WARNING, "joints", message, "check the order of the joints")
    far = [name for i, name in enumerate(names) if abs(own_mean[i] - mean[i]) > 5 * std[i] or ratio[i] > 5]
    if far:
        message = f"{key}: {some(far)} move where the weights were never trained"
        return Finding(WARNING, "units", message, "expected for another robot; otherwise check calibration and units")
    return Finding(FINE, "units", f"{key} is distributed as in the training of {source}")


def are_near(ratios: np.ndarray, factor: float) -> bool:
    """Whether most joints move so many times as far, which leaves a gripper its own unit."""
    return bool((np.abs(np.log(ratios / factor)) < np.log(1.6)).mean() >= 2 / 3)


def motion(subject: Subject) -> Iterable[Finding]:
    """State and actions in one unit, and no joint that never moves."""
    state, action = subject.columns.state_ND, subject.columns.action_ND
    if state.shape == action.shape:
        ratio = np.maximum(action.std(axis=0), 1e-9) / np.maximum(state.std(axis=0), 1e-9)
        for factor in (DEGREES_PER_RADIAN, 1 / DEGREES_PER_RADIAN):
            if are_near(ratio, factor):
                message = (
                    f"actions move {np.median(ratio):.3g} times as far as the state: degrees and radians are mixed"
                )
                yield Finding(ERROR, "units", message, "convert one of them")
    for key, values, _ in subject.vectors():
        spread = values.max(axis=0) - values.min(axis=0)
        flat = np.flatnonzero(spread <= max(NEAR_CONSTANT * spread.max(initial=0), 1e-8))
        if len(flat):
            names = [f"{dim_names(subject.dataset, key)[i]} (moves by {spread[i]:.3g})" for i in flat]
            message = f"{key}: {some(names)} never move; normalised, their smallest change becomes a large one"
            yield Finding(
                WARNING, "constant", message, "leave them out of the dataset unless they are meant to be fixed"
            )


# --- statistics ---------------------------------------------------------------------------------------------


def statistics(subject: Subject) -> Iterable[Finding]:
    """There, finite, and of this data in the space that is trained."""
    try:
        check_statistics(subject.config, subject.stats)
    except ValueError as error:
        yield Finding(ERROR, "statistics", str(error), RECOMPUTE)
        return
    try:
        check_relative_statistics(subject.config, subject.stats, subject.dataset.meta)
    except ValueError as error:
        problem, _, remedy = str(error).partition(". ")
        yield Finding(ERROR, "statistics", problem, remedy)
        return
    foreign = list(foreign_statistics(subject)) if subject.all_episodes else []
    yield from foreign
    if not foreign:
        yield Finding(
            FINE,
            "statistics",
            "those of state and actions are there" + (" and of this data" if subject.all_episodes else ""),
        )


def foreign_statistics(subject: Subject) -> Iterable[Finding]:
    """Stored mean and spread against those of the data, per dim."""
    for key, values, mode in subject.vectors():
        if mode is NormalizationMode.IDENTITY:
            continue
        mean, std, space = values.mean(axis=0), values.std(axis=0), "absolute"
        if key == ACTION and subject.config.use_relative_actions:
            mean, std, space = relative_statistics(subject)
        low, high = (array(subject.stats[key][name]) for name in STATISTICS[mode])
        if mode is NormalizationMode.MEAN_STD:
            bad = (np.abs(low - mean) > 0.2 * std + 1e-6) | (np.abs(high - std) > 0.2 * std + 1e-6)
        else:
            bad = (
                (low > mean + 0.2 * std)
                | (high < mean - 0.2 * std)
                | (high - low > 4 * (np.ptp(values, axis=0) + 1e-6))
            )
        if bad.any():
            names = [dim_names(subject.dataset, key)[i] for i in np.flatnonzero(bad)]
            hint = " --operation.relative_action=true" if space == "relative" else ""
            message = f"the statistics of {key} are not those of its {space} values: {some(names)}"
            yield Finding(ERROR, "statistics", message, f"lerobot-edit-dataset --operation.type=recompute_stats{hint}")


def relative_statistics(subject: Subject) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean and deviation of actions relative to the state at the beginning of their chunk, as LeRobot makes them."""
    try:
        stats = compute_relative_action_stats(
            subject.dataset.hf_dataset.with_format("numpy"), subject.dataset.meta.features, subject.config.chunk_size,
            subject.config.relative_exclude_joints,
        )  # fmt: skip
    except (RuntimeError, ValueError):  # no episode is as long as a chunk, and `episodes` says so
        *_, (_, values, _) = subject.vectors()
        return values.mean(axis=0), values.std(axis=0), "relative"
    return array(stats["mean"]), array(stats["std"]), "relative"


def outliers(subject: Subject) -> Iterable[Finding]:
    """Values that are not finite, or more than 10 when normalised: by episode, frame and joint."""
    for key, values, mode in subject.vectors():
        finite = np.isfinite(values)
        for what, grade, remedy, bad in (
            ("NaN or infinity", ERROR, "delete these episodes", ~finite),
            (f"|normalised| > {OUTLIER:g}", WARNING, "look at these frames: a jump of the bus or of the leader?",
             np.abs(normalise(np.where(finite, values, 0), subject.stats.get(key, {}), mode)) > OUTLIER),
        ):  # fmt: skip
            rows, dims = np.nonzero(bad)
            if len(rows):
                names = dim_names(subject.dataset, key)
                columns = subject.columns
                where = [
                    f"{names[d]} in episode {columns.episode[n]}, frame {columns.frame[n]}"
                    for n, d in zip(rows, dims, strict=True)
                ]
                yield Finding(grade, "outliers", f"{key}, {what}: {some(where)}", remedy)


def normalise(values_ND: np.ndarray, stats: dict[str, Any], mode: NormalizationMode) -> np.ndarray:
    """What the network would see; zeros where statistics are not there, which `statistics` says."""
    names = STATISTICS.get(mode)
    if names is None:
        return values_ND
    if any(name not in stats or array(stats[name]).size != values_ND.shape[1] for name in names):
        return np.zeros_like(values_ND)
    low, high = (array(stats[name]) for name in names)
    if mode is NormalizationMode.MEAN_STD:
        return (values_ND - low) / (high + 1e-8)
    return 2 * (values_ND - low) / (high - low + 1e-8) - 1


# --- prompts and episodes -----------------------------------------------------------------------------------


def prompts(subject: Subject) -> Iterable[Finding]:
    """Empty ones, cut ones, and how long they are."""
    tasks = {int(i): str(task) for task, i in subject.dataset.meta.tasks["task_index"].items()}
    used = {i: tasks.get(i, "") for i in np.unique(subject.columns.task).tolist()}
    episodes = {i: sorted({int(x) for x in subject.columns.episode[subject.columns.task == i]}) for i in used}
    if empty := [episode for i, task in used.items() if not task.strip() for episode in episodes[i]]:
        message = f"no instruction in episodes {some(empty)}; the policy refuses them"
        yield Finding(ERROR, "prompts", message, "lerobot-edit-dataset --operation.type=modify_tasks sets them")
    if subject.trained.tokenizer is None:
        message = f"tokens are not counted: {subject.trained.problem}"
        yield Finding(
            WARNING, "prompts", message, "see above; --policy.text_tokenizer_name=FOLDER names one that is here"
        )
        return
    lengths = {task: len(subject.trained.tokenizer(task.rstrip("\n") + "\n")["input_ids"]) for task in used.values()}
    limit = subject.config.tokenizer_max_length or 0
    if cut := [f"{task[:60]!r}… ({n} tokens)" for task, n in lengths.items() if n > limit]:
        message = f"cut after {limit} tokens: {some(cut)}"
        yield Finding(WARNING, "prompts", message, "shorten them, or train with a larger tokenizer_max_length")
    yield Finding(
        FINE, "prompts", f"{len(used)} instructions of at most {max(lengths.values())} tokens; room for {limit}"
    )


def episodes(subject: Subject) -> Iterable[Finding]:
    """Shorter than a chunk, not as long as the metadata says, or with time stamps off the fps."""
    columns, chunk, fps = subject.columns, subject.config.chunk_size, subject.dataset.meta.fps
    numbers, lengths = np.unique(columns.episode, return_counts=True)
    if (short := numbers[lengths < chunk]).size:
        message = f"{len(short)} of {len(numbers)} episodes are shorter than a chunk of {chunk}: {some(short.tolist())}"
        yield Finding(
            WARNING, "episodes", f"{message}; the rest of each chunk repeats the last action",
            f"record longer, or train with a shorter chunk_size (the median episode has {int(np.median(lengths))})",
        )  # fmt: skip
    recorded = dict(
        zip(subject.dataset.meta.episodes["episode_index"], subject.dataset.meta.episodes["length"], strict=True)
    )
    if wrong := [int(n) for n, length in zip(numbers, lengths, strict=True) if recorded.get(int(n)) != length]:
        yield Finding(
            ERROR,
            "episodes",
            f"other lengths than the metadata says: {some(wrong)}",
            "the dataset is damaged: copy it anew",
        )
    late = []
    for number in numbers:
        times = columns.timestamp[columns.episode == number].astype(np.float64)
        off = np.abs(np.diff(times) - 1 / fps)
        if off.size and off.max() > TOLERANCE_S:
            late.append(f"episode {number}, frame {int(off.argmax()) + 1} ({off.max() * 1e3:.1f} ms)")
    if late:
        message = f"time stamps are off {fps} fps: {some(late)}"
        yield Finding(
            ERROR,
            "time stamps",
            message,
            "frames of videos are found by time: delete the episodes, or set the fps right",
        )
    yield Finding(FINE, "episodes", f"{len(numbers)} of {lengths.min()} to {lengths.max()} frames, at {fps} fps")


def one_batch(subject: Subject) -> Iterable[Finding]:
    """One sample goes through the processors and is accepted by the policy, weights apart."""
    if subject.trained.tokenizer is None:
        return
    config = subject.config
    try:
        overrides = {
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": subject.rename_map},
            "normalizer_processor": {
                "stats": subject.stats,
                "features": {**config.input_features, **config.output_features},
                "norm_map": config.normalization_mapping,
            },
        }
        source = subject.trained.source
        preprocessor, _ = make_pre_post_processors(
            config, pretrained_path=source, dataset_stats=subject.stats,
            preprocessor_overrides=overrides if source else None,
        )  # fmt: skip
        item = subject.dataset[0]
        ObservationMaker(config)(preprocessor(item), torch.device("cpu"))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        yield Finding(ERROR, "sample", f"the policy would not take the first frame: {error}", "see the errors above")
        return
    yield Finding(FINE, "sample", "the first frame goes through the processors, and the policy takes it")


def weights(subject: Subject) -> Iterable[Finding]:
    """The checkpoint's tensors are those of the network that the options ask for."""
    source, config = subject.trained.source, subject.config
    if source is None or config.use_peft:
        return
    try:
        Checkpoint.open(source).check(network_parameters(config), config=config)
    except CheckpointError as error:
        yield Finding(ERROR, "weights", str(error), "training would stop with the same message")
        return
    yield Finding(FINE, "weights", f"names and shapes of {source}'s tensors are the network's")


def memory(subject: Subject) -> Iterable[Finding]:
    """Whether a step of training fits the card."""
    if subject.card_gb is None:
        return
    from .plan import GIB, RESERVE_GB, Load, counted, largest_batch  # the network, which no other question needs

    config, batch, tokenizer = copy.deepcopy(subject.config), subject.batch_size, subject.trained.tokenizer
    shapes = [subject.dataset.meta.features[key]["shape"] for key in subject.cameras.values()]
    images = tuple(tuple(sorted(shape)[-2:]) for shape in shapes)  # channels are 3, wherever they stand
    longest = config.tokenizer_max_length or 1
    if tokenizer is not None:
        tasks = subject.dataset.meta.tasks.index
        longest = min(longest, max(len(tokenizer(f"{task}\n")["input_ids"]) for task in tasks))
    try:
        counts, trained = counted(config, Load(images, longest), batch)
    except ToolError as error:
        yield Finding(WARNING, "memory", str(error), "try the batch size in a short run")
        return
    largest = largest_batch(counts, (subject.card_gb - RESERVE_GB) * GIB)
    takes = (
        f"a step of {batch} samples that trains {trained / 1e6:.1f} M weights takes {counts[batch].peak / GIB:.1f} GiB "
        f"at its peak, of {subject.card_gb:g}; {RESERVE_GB:g} is left for what is no tensor"
    )
    if batch <= largest:
        yield Finding(FINE, "memory", f"{takes}; the largest batch is {largest}")
        return
    less = f"--batch_size={largest}, or " if largest else ""
    remedy = (
        f"{less}--policy.gradient_checkpointing=true, --policy.train_expert_only=true, --policy.dtype=bfloat16, "
        "--policy.optimizer_8bit=true; `lerobot-pi0 plan` lists what fits, LoRA too"
    )
    yield Finding(ERROR, "memory", takes, remedy)


CHECKS: tuple[Callable[[Subject], Iterable[Finding]], ...] = (
    cameras, pictures_of_training, images, joints, units, motion, statistics, outliers, prompts, episodes, one_batch,
    weights, memory,
)  # fmt: skip
"""In the order of the report."""

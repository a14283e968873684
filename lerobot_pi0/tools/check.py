"""`lerobot-pi0 check`: faults of a dataset, and whether it suits a policy and a robot. Run it before training.

    lerobot-pi0 check --policy.type=pi0 --policy.pretrained_path=lerobot/pi0_base --dataset.repo_id=you/cubes
    lerobot-pi0 check --policy.path=you/pi0_cubes --dataset.repo_id=you/more_cubes \\
        --robot.type=so100_follower --robot.port=none --robot.cameras='{front: {type: opencv, index_or_path: 0}}'

Every finding is an error (training would fail, or learn something wrong), a warning (look at it) or fine, and says
what to do. The robot is not connected. The exit status is 1 if there are errors.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline
from lerobot.robots import Robot, RobotConfig, make_robot_from_config
from lerobot.scripts import lerobot_rollout  # noqa: F401  makes LeRobot's robots and cameras known by name
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from lerobot.utils.feature_utils import dataset_to_policy_features

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quoting import plain
from ..configuration_pi0 import PI0Config
from ..inputs import statistics
from ..inputs.features import narrow_padded
from ..inputs.joints import take_names
from ..inputs.pipelines import rename_cameras, run_of
from ..inputs.samples import leave_out_depth
from ..inputs.steps import PI0TokenizerStep, TokenizerError, load_tokenizer
from . import ToolError
from .checks import CHECKS, NEED_FRAMES, report
from .checks.subject import ERROR, Finding, Subject, Trained
from .data import DatasetOptions, build_pipelines, need_pi0, open_recording
from .folder import short

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """Check a dataset against a policy, and a robot's configuration against both."""

    dataset: DatasetOptions
    # The policy: --policy.path=CHECKPOINT, or --policy.type=pi0 and the options of the training to come.
    policy: PreTrainedConfig | None = None
    # The robot, as lerobot-rollout takes it.
    robot: RobotConfig | None = None
    # Renamed cameras, as lerobot-train takes it: {dataset's key: policy's key}.
    rename_map: dict[str, str] = field(default_factory=dict)
    # Frames to decode per camera, in runs of consecutive ones spread over the episodes.
    images: int = 600
    # Memory of the card to train on, in GiB; by default memory is not checked. `lerobot-pi0 plan` tells more.
    card_gb: float | None = None
    # Samples per step on that card, as lerobot-train takes it.
    batch_size: int = 8
    # Write a page of HTML too, with pictures of the cameras: the name of its file.
    html: Path | None = None
    # Print JSON.
    json: bool = False


def run(options: Options) -> int:
    """Print the findings. Returns 1 if there are errors.

    Raises:
        CheckpointError, ToolError: policy, dataset or robot cannot be read at all.
    """
    with _said_by_findings(statistics.logger):
        subject = open_subject(options)
        findings = [finding for question in CHECKS for finding in answers(subject, question)]
    counts = report.counts(findings)
    if options.html is not None:
        report.page(subject, findings, options.dataset.repo_id).write(options.html)
    if options.json:
        print(json.dumps({"counts": counts, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        print(plain(report.as_text(findings), keep="\n"))
    return 1 if counts[ERROR] else 0


@contextlib.contextmanager
def _said_by_findings(logger: logging.Logger) -> Iterator[None]:
    """Keep what one module warns of out of the log: the findings say it, once and with the dataset's names."""
    logger.addFilter(below := lambda record: record.levelno > logging.WARNING)
    try:
        yield
    finally:
        logger.removeFilter(below)


def open_subject(options: Options) -> Subject:
    """Policy, dataset and robot, as training would put them together.

    Raises:
        CheckpointError, ToolError: policy, dataset or robot cannot be read at all.
    """
    config = need_pi0(options.policy)
    config.device = "cpu"
    dataset = open_recording(options.dataset)
    features = dataset_to_policy_features(dataset.meta.features)
    keeps_features = bool(config.input_features)
    if not keeps_features:  # as LeRobot's make_policy does
        config.input_features = {key: x for key, x in features.items() if x.type is not FeatureType.ACTION}
    leave_out_depth(config)
    config.output_features = {key: x for key, x in features.items() if x.type is FeatureType.ACTION}
    config.action_feature_names = None
    take_names(config, dataset.meta)
    take_checkpoint(config, dataset, options.rename_map)
    trained = read_trained(config)
    return Subject(
        config=config,
        keeps_features=keeps_features,
        trained=trained,
        dataset=dataset,
        all_episodes=options.dataset.episodes is None,
        robot=make_robot(options.robot),
        rename_map=options.rename_map,
        images=options.images,
        card_gb=options.card_gb,
        batch_size=options.batch_size,
    )


def answers(subject: Subject, question: Callable[[Subject], Iterable[Finding]]) -> Iterable[Finding]:
    """The findings of one question; one that cannot be answered is a finding, and the others go on."""
    if question in NEED_FRAMES and not len(subject.columns.episode):
        return
    try:
        yield from question(subject)
    except Exception as error:  # whatever a damaged dataset leads to, the other questions are to be answered
        logger.debug("%s", question.__name__, exc_info=True)
        yield Finding(
            ERROR, question.__name__, f"this check could not be done: {short(error)}",
            "see the other findings: mend those first, then check again",
        )  # fmt: skip


def take_checkpoint(config: PI0Config, dataset: Any, rename_map: dict[str, str]) -> None:
    """Settle what a run that begins from `pretrained_path` settles: options, cameras, dims of padded features.

    Raises:
        CheckpointError: there is no such checkpoint, or it is no π₀.
    """
    if config.pretrained_path:
        place = str(config.pretrained_path)
        Checkpoint.open(place, revision=config.pretrained_revision).settle_processors(config, dataset.meta, trains=True)
        if (run := run_of(place)) is not None:
            rename_cameras(run, rename_map)
    narrow_padded(config, lambda: dataset.meta.stats)


def read_trained(config: PI0Config) -> Trained:
    """Read what the weights of `pretrained_path` were trained on; without one, the source is None.

    Raises:
        CheckpointError: there is no such checkpoint, it is no π₀, or its processors would run a program.
        ToolError: its processors cannot be rebuilt.
    """
    source = config.pretrained_path
    try:
        if source is None:
            return Trained(None, None, {}, load_tokenizer(config.tokenizer), None)
    except TokenizerError as error:
        return Trained(None, None, {}, None, str(error))
    checkpoint = Checkpoint.open(source, revision=config.pretrained_revision)
    before = checkpoint.config()
    if checkpoint.source.file(f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json") is None:
        return Trained(str(source), before, {}, None, f"{source} has no preprocessor, which LeRobot needs")
    checkpoint.check_processors(before, replaced=not config.input_features)
    preprocessor, _ = build_pipelines(config, device_processor={"device": "cpu"})
    names = checkpoint.pipelines.rename_map
    stats = {names.get(key, key): x for key, x in _stats(preprocessor).items()}  # they have the dataset's names
    return Trained(str(source), before, stats, *tokenizer_of(preprocessor), names)


def _stats(preprocessor: PolicyProcessorPipeline) -> dict:
    steps = [step for step in preprocessor.steps if isinstance(step, NormalizerProcessorStep)]
    return dict(steps[0].stats or {}) if steps else {}


def tokenizer_of(preprocessor: PolicyProcessorPipeline) -> tuple[Any, str | None]:
    """The tokenizer, or why it cannot be had."""
    try:
        return next((x.input_tokenizer for x in preprocessor.steps if isinstance(x, PI0TokenizerStep)), None), None
    except TokenizerError as error:
        return None, str(error)


def make_robot(config: RobotConfig | None) -> Robot | None:
    """The robot, not connected: its joints and cameras are known without a connection.

    Raises:
        ToolError: its driver is not installed, or refuses the configuration.
    """
    if config is None:
        return None
    try:
        return make_robot_from_config(config)
    except Exception as error:  # drivers raise errors of many kinds
        raise ToolError(f"--robot.type={config.type} cannot be set up: {error}") from error

"""`lerobot-pi0 check`: faults of a dataset, and whether it suits a policy and a robot. Run it before training.

    lerobot-pi0 check --policy.type=pi0 --policy.pretrained_path=lerobot/pi0_base --dataset.repo_id=you/cubes
    lerobot-pi0 check --policy.path=you/pi0_cubes --dataset.repo_id=you/more_cubes \\
        --robot.type=so100_follower --robot.port=none --robot.cameras='{front: {type: opencv, index_or_path: 0}}'

Every finding is an error (training would fail, or learn something wrong), a warning (look at it) or fine, and says
what to do. The robot is not connected. The exit status is 1 if there are errors.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline
from lerobot.robots import Robot, RobotConfig, make_robot_from_config
from lerobot.scripts import lerobot_rollout  # noqa: F401  makes LeRobot's robots and cameras known by name
from lerobot.utils.constants import ACTION, POLICY_PREPROCESSOR_DEFAULT_NAME
from lerobot.utils.feature_utils import dataset_to_policy_features

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quoting import plain
from ..configuration_pi0 import PI0Config
from ..inputs.steps import PI0TokenizerStep, TokenizerError, load_tokenizer
from . import ToolError
from .checks import CHECKS
from .checks.subject import ERROR, FINE, WARNING, Finding, Subject, Trained
from .data import DatasetOptions, dim_names, need_pi0, open_dataset, read_columns


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
    # Print JSON.
    json: bool = False


def run(options: Options) -> int:
    """Print the findings. Returns 1 if there are errors.

    Raises:
        CheckpointError, ToolError: policy, dataset or robot cannot be read at all.
    """
    findings = list(check(options))
    counts = {grade: sum(finding.grade == grade for finding in findings) for grade in (ERROR, WARNING, FINE)}
    if options.json:
        print(json.dumps({"counts": counts, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        print(plain(as_text(findings), keep="\n"))
    return 1 if counts[ERROR] else 0


def check(options: Options) -> Iterable[Finding]:
    """Run all checks.

    Raises:
        CheckpointError, ToolError: policy, dataset or robot cannot be read at all.
    """
    config = need_pi0(options.policy)
    config.device = "cpu"
    dataset = open_dataset(options.dataset)
    trained = read_trained(config)
    features = dataset_to_policy_features(dataset.meta.features)
    keeps_features = bool(config.input_features)
    if not keeps_features:  # as LeRobot's make_policy does
        config.input_features = {key: x for key, x in features.items() if x.type is not FeatureType.ACTION}
    config.output_features = {key: x for key, x in features.items() if x.type is FeatureType.ACTION}
    config.action_feature_names = dim_names(dataset, ACTION)
    subject = Subject(
        config=config,
        keeps_features=keeps_features,
        trained=trained,
        dataset=dataset,
        all_episodes=options.dataset.episodes is None,
        columns=read_columns(dataset),
        robot=make_robot(options.robot),
        rename_map=options.rename_map,
        images=options.images,
        card_gb=options.card_gb,
        batch_size=options.batch_size,
    )
    for one in CHECKS:
        yield from one(subject)


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
    checkpoint = Checkpoint.open(source)
    before = checkpoint.config()
    if checkpoint.source.file(f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json") is None:
        return Trained(str(source), before, {}, None, f"{source} has no preprocessor, which LeRobot needs")
    checkpoint.check_processors(before, replaced=not config.input_features)
    try:
        preprocessor, _ = make_pre_post_processors(
            config, pretrained_path=str(source), preprocessor_overrides={"device_processor": {"device": "cpu"}}
        )
        return Trained(str(source), before, _stats(preprocessor), _tokenizer(preprocessor), None)
    except TokenizerError as error:
        return Trained(str(source), before, _stats(preprocessor), None, str(error))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ToolError(f"the processors of {source} cannot be rebuilt: {error}") from error


def _stats(preprocessor: PolicyProcessorPipeline) -> dict:
    steps = [step for step in preprocessor.steps if isinstance(step, NormalizerProcessorStep)]
    return dict(steps[0].stats or {}) if steps else {}


def _tokenizer(preprocessor: PolicyProcessorPipeline) -> object:
    steps = [step for step in preprocessor.steps if isinstance(step, PI0TokenizerStep)]
    return steps[0].input_tokenizer if steps else None


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


def as_text(findings: list[Finding]) -> str:
    """The findings as text, errors first."""
    lines = []
    for grade in (ERROR, WARNING, FINE):
        for finding in findings:
            if finding.grade == grade:
                lines.append(f"{grade:8} {finding.about:12} {finding.message}")
                lines += [f"{'':21} → {finding.remedy}"] if finding.remedy else []
    counts = [f"{sum(x.grade == grade for x in findings)} {grade}" for grade in (ERROR, WARNING, FINE)]
    return "\n".join([*lines, "", ", ".join(counts)])

"""Upload of a checkpoint of lerobot-train to the Hub: weights, processors, the run's options, and a model card.

    hf auth login
    python examples/push.py --policy=outputs/train/my_run/checkpoints/last/pretrained_model --repo_id=you/pi0_cubes

lerobot-train does the same at the end of a run with --policy.push_to_hub=true.
"""

from dataclasses import dataclass
from pathlib import Path

import draccus
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies import make_pre_post_processors

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.checkpoint import Checkpoint


@dataclass
class Options:
    """Push a checkpoint."""

    # Folder of the checkpoint: `pretrained_model` of a run.
    policy: Path
    # Repository on the Hub: owner/name. It is created if it does not exist.
    repo_id: str
    # Whether the repository is private.
    private: bool = False


@draccus.wrap()
def main(options: Options) -> None:
    config = Checkpoint.open(options.policy).config()
    config.repo_id, config.private = options.repo_id, options.private
    policy = PI0Policy.from_pretrained(options.policy, config=config)
    policy.push_model_to_hub(TrainPipelineConfig.from_pretrained(options.policy))
    for processor in make_pre_post_processors(config, str(options.policy)):
        processor.push_to_hub(options.repo_id)
    print(f"pushed: lerobot-rollout --policy.path={options.repo_id}")


if __name__ == "__main__":
    main()

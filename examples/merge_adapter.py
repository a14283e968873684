"""Merging of a LoRA adapter into the weights of its base. The result is an ordinary checkpoint, for any use.

    python examples/merge_adapter.py --adapter=outputs/train/my_lora/checkpoints/last/pretrained_model --output=merged

The base has to be where it was in training: on the Hub, or in its folder.
"""

from dataclasses import dataclass
from pathlib import Path

import draccus
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from peft import PeftConfig, PeftModel

from lerobot_pi0 import PI0Config, PI0Policy
from lerobot_pi0.checkpoints.checkpoint import Checkpoint


@dataclass
class Options:
    """Merge an adapter."""

    # Folder of the adapter: `pretrained_model` of a run with --peft.method_type=LORA.
    adapter: Path
    # New folder for the merged checkpoint.
    output: Path


@draccus.wrap()
def main(options: Options) -> None:
    if options.output.exists():
        raise SystemExit(f"{options.output} exists: name a new folder")
    config = PreTrainedConfig.from_pretrained(options.adapter)
    assert isinstance(config, PI0Config)
    config.use_peft, config.pretrained_path = True, options.adapter  # so that a base which has changed is refused
    config.take_saved(Checkpoint.open(options.adapter).saved())
    adapter = PeftConfig.from_pretrained(options.adapter)
    policy = PI0Policy.from_pretrained(adapter.base_model_name_or_path, config=config, revision=adapter.revision)
    merged = PeftModel.from_pretrained(policy, options.adapter, config=adapter).merge_and_unload()
    config.use_peft = False  # the merged weights have no adapter
    config.save_expert_only = False  # and may differ from the base's everywhere
    merged.save_pretrained(options.output)
    for processor in make_pre_post_processors(config, str(options.adapter)):
        processor.save_pretrained(options.output)
    print(f"merged: lerobot-train --policy.path={options.output}")


if __name__ == "__main__":
    main()

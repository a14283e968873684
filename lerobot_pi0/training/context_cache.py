"""Training on cached contexts (`context_cache`): the action expert is trained, and the VLM is not in memory.

The prefix sees neither state, actions and noise nor the expert. So with a frozen VLM its keys and values depend on the
frame alone. `lerobot-pi0 cache` computes them once for each frame (`context_store`), and writes a dataset next to them.
Training reads this dataset: LeRobot then asks only for frames that are cached, and decodes no images. The `index` of a
batch's sample says which context belongs to it.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import pad_vector
from lerobot.utils.constants import ACTION
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.observation import Augment, ObservationMaker
from ..inputs.samples import IS_PAD, ObservationError
from ..network.pi0 import Observation
from .context_store import DATASET, ContextCache, ContextCacheError, compare, read_manifest
from .ema import sharding


class CachedObservations(ObservationMaker):
    """Makes observations with cached keys and values in place of images."""

    def __init__(self, config: PI0Config) -> None:
        super().__init__(config)
        self.place = str(config.context_cache)

    @cached_property
    def contexts(self) -> ContextCache:
        """The cache, opened when it is first needed: `lerobot-pi0 plan` counts memory without one."""
        return ContextCache(self.place)

    def with_index(
        self, batch: Mapping[str, Any], device: torch.device, augment: Augment | None = None
    ) -> tuple[Observation, list[int] | None]:
        """The observation with the keys and values of its prefix, and the indices of the samples.

        Raises:
            ContextCacheError: a sample has no context, or one from other cameras or another prompt.
            ObservationError: as in `ObservationMaker.with_index`, or the batch has no `index`.
        """
        obs, index = super().with_index(batch, device)
        if index is None or len(index) != len(obs.state_BA):
            raise ObservationError(
                "no 'index' for each sample of the batch: a policy with context_cache finds contexts by it, and takes "
                "batches of its cache's dataset alone. To act, load the checkpoint without context_cache"
            )
        self.contexts.check_prompts(index, obs.tokens_BL, obs.token_mask_BL)
        return obs._replace(prefix=self.contexts.read(index, obs.tokens_BL.shape[1], device)), index

    def assemble(
        self, cameras: Mapping[str, Tensor], tokens_BL: Tensor, mask_BL: Tensor, state: Tensor, augment: Any = None
    ) -> Observation:
        """An observation without images. The batch has black pixels as images, which only name the cameras."""
        if list(cameras) != self.contexts.manifest.cameras:
            compare(self.contexts.folder, {"cameras": self.contexts.manifest.cameras}, {"cameras": list(cameras)})
        images = state.new_empty(len(state), 0, 3, self.config.image_size, self.config.image_size)
        return Observation(images, tokens_BL, mask_BL, pad_vector(state, self.config.max_state_dim))


def observations(config: PI0Config) -> ObservationMaker:
    """The maker of a policy's observations. With `context_cache` it reads contexts, and this sets the options for it.

    Raises:
        ValueError: an option cannot be combined with `context_cache`.
    """
    if not config.context_cache:
        return ObservationMaker(config)
    together = "does not go together with context_cache"
    for name, off in (("augment_images", "false"), ("augment_shift", "0")):
        if getattr(config, name):
            raise ValueError(
                f"{name} {together}, whose contexts are of pictures as they were recorded: set --policy.{name}={off}"
            )
    if config.vlm_quantization:
        raise ValueError(f"vlm_quantization {together}, which needs no VLM at all: leave it out")
    if kind := sharding():
        raise ValueError(f"{kind} {together}: train under DDP, the expert is small")
    for name in ("train_expert_only", "save_expert_only"):
        if getattr(config, name) is False:
            raise ValueError(f"{name}=false {together}, as the VLM is not in memory: set --policy.{name}=true")
        setattr(config, name, True)
    return CachedObservations(config)


def check(observe: ObservationMaker, digests: Mapping[str, str]) -> None:
    """`ContextCache.check`, if the policy has a cache."""
    if isinstance(observe, CachedObservations):
        observe.contexts.check(observe.config, digests)


def take_features(config: PI0Config, features: dict[str, Any]) -> None:
    """Check that a dataset belongs to the contexts, and set the shape of its actions to that of a step, not a chunk.

    Args:
        features: LeRobot's description of the dataset. It is changed to that of a recorded dataset.

    Raises:
        ContextCacheError: it is another dataset.
    """
    manifest, action = read_manifest(Path(str(config.context_cache))), features.get(ACTION, {})
    if (action.get("info") or {}).get("contexts") != manifest.name:
        raise ContextCacheError(
            f"context_cache={config.context_cache} goes with the dataset beside the contexts, not with this one: give "
            f"--dataset.root={Path(str(config.context_cache)) / DATASET}"
        )
    action["shape"] = tuple(action["shape"])[-1:]
    features.pop(IS_PAD, None)
    config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, action["shape"])}

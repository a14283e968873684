"""Origin of a policy's weights: what a save need not write again, what can be pushed, what the model card names."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..configuration_pi0 import PLUGIN_CONFIG_NAME, PI0Config
from . import manifest
from .names import published_state
from .source import Source
from .tensor_bytes import digest_of_json
from .writing import save

logger = logging.getLogger(__name__)


class Base(NamedTuple):
    """The checkpoint that frozen weights come from, when they are not written again."""

    id: str
    revision: str | None
    digest: str


@dataclass
class Origin:
    """Where a policy's weights come from.

    Args:
        start: what the run began with: a Hub id or a folder; None for random weights.
        base: the checkpoint that the weights were read from; None if they are random.
        digests: of weights that the base has, by name, as its files hold them; empty unless a save may leave them out.
        statistics: digest of the statistics that the policy was built with, or that it was loaded with.
    """

    start: str | None = None
    base: Base | None = None
    digests: dict[str, str] = field(default_factory=dict)
    statistics: str | None = None
    _saved_in: Path | None = None

    @classmethod
    def of(
        cls, source: Source, saved: dict[str, Any], digests: dict[str, str], statistics: str | None = None
    ) -> "Origin":
        """The origin of a policy that was loaded.

        Args:
            saved: what this plugin saved with the checkpoint (`Checkpoint.settle`).
            digests: what `Checkpoint.read` returned.
            statistics: digest of those that a run has put in the checkpoint's place, if it has.
        """
        base: Base | None = saved.get("base")
        start = saved.get("start")
        # A folder by where it really is: the link `last` will lead to another one soon.
        own = Base(*source.identity, digest="")
        ours = saved.keys() - {"statistics"}
        if not ours or source.folder is None:  # our own folders know what their run began with
            start = own.id if base is None else source.place
        return cls(start, base or own, digests, statistics or saved.get("statistics"))

    @property
    def folder(self) -> str | None:
        """The folder that the weights come from, if they do not come from the Hub."""
        return None if self.base is None or self.base.revision is not None else self.base.id

    def save(self, folder: Path, config: PI0Config, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Write a checkpoint: all weights, or with `save_expert_only` those that the base does not have.

        Args:
            module: tells which of its parameters are frozen.
            state: the weights to write, by name.

        Raises:
            ValueError: as `left_to_base`; or all weights would be written, and the VLM's are not in memory.
        """
        if (option := _instead_of_vlm(config)) and not config.save_expert_only:
            raise ValueError(
                f"the VLM is {option}, so a whole checkpoint cannot be written from it: "
                "load the policy without, and save that; or set save_expert_only=True"
            )
        configs = config.to_files()
        configs[PLUGIN_CONFIG_NAME]["start"] = self.start
        if config.save_expert_only:
            names, base = self.left_to_base(module, folder)
            configs[PLUGIN_CONFIG_NAME]["base"] = base._asdict()
            tensors = {name: x for name, x in state.items() if name not in names}
        else:
            tensors = published_state(state)
        save(folder, configs, tensors, self._recorded_statistics())
        self._saved_in = folder

    def _recorded_statistics(self) -> str | None:
        """Those of the processors that were last saved with this policy, or else those that it was built with.

        A resumed run keeps the processors of its checkpoint, whatever its dataset has become.
        """
        place = self._saved_in  # which may have been deleted since
        known = manifest.read(Source(place)) if place is not None and place.is_dir() else None
        return self.statistics if known is None or known["processors"] is None else known["statistics"]

    def left_to_base(self, module: nn.Module, folder: Path | None = None) -> tuple[set[str], Base]:
        """Which weights a checkpoint need not hold, and the base that has them: those that are frozen and the base's.

        Args:
            folder: where the checkpoint will be written, if that is known.

        Raises:
            ValueError: no weight comes from a checkpoint, none is frozen, or `folder` is the base.
        """
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        digests = {name: x for name, x in self.digests.items() if name in frozen}
        if self.base is None or not digests:
            raise ValueError(
                "save_expert_only=True leaves the frozen weights to the checkpoint they were loaded from, but this "
                "policy was not loaded from one, or trains everything: set save_expert_only=False"
            )
        if folder is not None and str(folder.resolve()) == self.base.id:
            raise ValueError(
                f"save_expert_only=True would write the trained weights over {folder}, which alone holds the frozen "
                "ones: save to another folder"
            )
        return set(digests), self.base._replace(digest=digest_of_json(digests))

    def check_run(self, config: PI0Config, module: nn.Module) -> None:
        """Refuse, before training, what could not be saved or pushed after it.

        Raises:
            ValueError: as `left_to_base`; or the frozen weights are in a folder, and rounded here.
        """
        if config.save_expert_only:
            self.left_to_base(module)
        option = _instead_of_vlm(config)
        if config.push_to_hub and config.repo_id and option and self.folder is not None:
            raise ValueError(
                f"the frozen weights are in the folder {self.folder}, which nobody else has, and a VLM that is "
                f"{option} cannot be pushed with the trained ones: set --policy.push_to_hub=false, and push the "
                "checkpoint after training, loaded without that option; or begin with a checkpoint of the Hub"
            )

    @contextmanager
    def complete_for_others(self, config: PI0Config) -> Iterator[None]:
        """While a policy is pushed: `save_expert_only` is off where the base is a folder, which nobody else has."""
        asked = config.save_expert_only
        if config.use_peft and self.folder is not None:
            logger.warning("pushing an adapter alone: its base is the folder %s, which nobody else has", self.folder)
        elif asked and self.folder is not None:
            logger.warning("pushing all weights, not the expert's alone: their base is the folder %s", self.folder)
            config.save_expert_only = False
        try:
            yield
        finally:
            config.save_expert_only = asked


def _instead_of_vlm(config: PI0Config) -> str | None:
    """What is in memory in place of the VLM, with the option that asks for it; None where the VLM itself is."""
    if config.context_cache:
        return "left out of memory (context_cache)"
    return "rounded in memory (vlm_quantization)" if config.vlm_quantization else None

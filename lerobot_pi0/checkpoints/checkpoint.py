"""A checkpoint of π₀: its configuration, what this plugin saved with it, its weights and its statistics.

It is compared with the network by names, shapes and configuration before any weight is read. The network is built on
the `meta` device, and each tensor is read straight into its final place, so that no weight is ever random by accident.
"""

import logging
import time
from collections.abc import Container, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import TRAINING_STATE_DIR
from torch import Tensor, nn

from ..configuration_pi0 import PLUGIN_CONFIG_NAME, PI0Config
from ..inputs.normalisation import Normalisation
from . import adapters, manifest
from .configs import check_type, decode_config, decode_saved, overrule
from .errors import (
    CheckpointConfigError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MismatchedCheckpointError,
    WrongPolicyError,
)
from .matching import SHAPING, check_tensors, describe_differences, general_advice
from .names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EMBEDDING, VLM
from .origin import Base
from .pipelines import Pipelines
from .processors import settle_processors
from .reading import Stored, fill, index_tensors
from .source import Source
from .tensor_bytes import digest_of_json
from .writing import finish_interrupted_save

logger = logging.getLogger(__name__)


class Checkpoint:
    """A checkpoint in a folder or on the Hub. Nothing of it is read before it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._run: Checkpoint | None = None
        self._finish_save()

    @classmethod
    def open(cls, place: str | Path, **hub: Any) -> "Checkpoint":
        """The checkpoint at a place.

        Args:
            place: path of a folder, or Hub id.
            hub: options of `hf_hub_download`, such as `revision` and `token`.

        Raises:
            CheckpointNotFoundError: there is no such repository or revision, or no way to it.
        """
        return cls(Source(place, **hub))

    def __str__(self) -> str:
        return str(self.source)

    def _finish_save(self) -> None:
        if self.source.folder is not None:
            self.source.reads_new = finish_interrupted_save(self.source.folder)

    # --- configuration ---

    def raw_config(self) -> dict[str, Any] | None:
        """The content of config.json, None where there is none.

        Raises:
            CheckpointError: it is cut, or names another policy.
        """
        content = self.source.read_json(CONFIG_NAME)
        if content is None:
            self._refuse_adapter()
        else:
            check_type(content, self.source.place)
        return content

    def config(self) -> PI0Config:
        """The configuration, from config.json.

        Raises:
            CheckpointError: there is none, it is cut, or it is not π₀'s.
        """
        content = self.raw_config()
        if content is None:
            raise CheckpointNotFoundError(f"{self} holds no {CONFIG_NAME}: is it the folder `pretrained_model`?")
        return decode_config(content, self.source.place)

    def saved(self) -> dict[str, Any]:
        """What only this plugin knows about the checkpoint; empty for checkpoints of others.

        These are options by name (`PLUGIN_FIELDS`), `updates` (int), `start` (str or None) and `base` (Base or None).

        Raises:
            CheckpointError: the file is cut, from a newer version of this plugin, or holds values that no option takes.
        """
        content = self.source.read_json(PLUGIN_CONFIG_NAME)
        return {} if content is None else decode_saved(content, self.source.place)

    def settle(self, config: PreTrainedConfig, meta: Any = None, trains: bool = False) -> dict[str, Any]:
        """Bring the options of a run together with the checkpoint: what it has decided for good overrules `config`.

        Args:
            config: options of the run, which LeRobot may have parsed. With `use_peft` and a `pretrained_path`, this
                checkpoint is the base of the adapter there, and the run's own options lie beside the adapter.
            meta, trains: as for `settle_processors`, which is called here, after the processors are checked.

        Returns:
            What this plugin saved, as `saved`, with the options of the run's own folder.

        Raises:
            CheckpointError: a file is broken or another policy's, or the adapter does not go with the options.
        """
        self.raw_config()
        saved, run = self.saved(), self.of_run(config)
        statistics = run.check_processors(config, replaced=trains)
        if not saved and (Path(self.source.place).resolve().parent / TRAINING_STATE_DIR).is_dir():
            logger.warning(
                "%s was trained by LeRobot's built-in π₀: its weights are loaded, but the run cannot be resumed, as "
                "its optimizer counts other parameters (LeRobot says: List length mismatch). Begin a new run with "
                "--policy.path=%s, or resume with LEROBOT_PI0_TAKEOVER=0",
                self,
                self,
            )
        if run is not self:
            saved = saved or {"start": self.source.identity[0]}  # of a base that this plugin has not written
            saved |= {name: value for name, value in run.saved().items() if name not in ("start", "base")}
        if isinstance(config, PI0Config):  # the policy refuses another by name
            if run is not self and config.vlm_quantization and run._adapts_vlm():
                raise CheckpointConfigError(
                    f"the adapter {run} adapts the VLM, which vlm_quantization would round: merge it first "
                    "(examples/merge_adapter.py), or leave the option out"
                )
            overrule(config, saved, self.source.place)
            self.settle_processors(config, meta, trains)
        return saved | {"statistics": statistics}

    def settle_processors(self, config: PI0Config, meta: Any, trains: bool) -> None:
        """Bring the options of a run together with the processors that LeRobot will rebuild from this checkpoint.

        Args:
            config: options of the run, as for `settle`; those that nobody set take the processors' values.
            meta: the LeRobotDatasetMetadata of the dataset to train on, or None.
            trains: whether the policy is built for training.

        Raises:
            CheckpointError: a file is broken, or an option cannot be changed without training.
        """
        run = self.of_run(config)
        own = run.source.read_json(CONFIG_NAME) or {}  # beside an adapter there may be none
        # An adapter may have been trained with other cameras than its base.
        slots = own if manifest.cameras(own) else self.raw_config() or {}
        settle_processors(run.pipelines, slots, own, config, meta, trains)

    def of_run(self, config: PreTrainedConfig) -> "Checkpoint":
        """The checkpoint with the run's own options and processors: an adapter's, if one is loaded over this one."""
        if not (config.use_peft and config.pretrained_path):
            return self
        if self._run is None or self._run.source.place != str(config.pretrained_path):
            self._run = Checkpoint(self.source.other(config.pretrained_path, config.pretrained_revision))
        return self._run

    # --- processors ---

    @cached_property
    def pipelines(self) -> Pipelines:
        """What its processor files say; raises as `Pipelines`."""
        return Pipelines(self.source)

    def check_processors(self, config: Any, replaced: bool = False) -> str | None:
        """Refuse what would run a program, is not π₀'s, or was not saved together; LeRobot builds pipelines after it.

        Args:
            config: the options that statistics and steps have to suit; another policy's are not looked at.
            replaced: whether a run puts statistics, features and relative actions of its own in the checkpoint's place.

        Returns:
            Digest of the statistics in the checkpoint's processors; None without any.

        Raises:
            CheckpointError: a file is unsafe, broken, lost, or another than was saved.
        """
        statistics = self.pipelines.digest
        manifest.check(self.source, statistics)
        if isinstance(config, PI0Config):
            self.pipelines.check(config, replaced)
        return statistics

    def normalisation(self, config: PreTrainedConfig) -> Normalisation:
        """What the run's preprocessor does to state and actions; an adapter's, if there is one."""
        return self.of_run(config).pipelines.normalisation or Normalisation({}, {})

    # --- weights ---

    @cached_property
    def own(self) -> dict[str, Stored]:
        """The tensors of the checkpoint's own files, by name. Raises CheckpointError as `check`."""
        return index_tensors(self._weight_files())

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All its tensors, by name: its own, and those that it leaves to its base. Raises as `own`."""
        if self._base is None:
            return self.own
        own = self.own
        return Checkpoint(self.source.other(self._base.id, self._base.revision)).own | own

    @cached_property
    def _base(self) -> Base | None:
        return self.saved().get("base")

    def check(
        self,
        parameters: Mapping[str, Tensor],
        strict: bool = True,
        config: PI0Config | None = None,
        rounded: Container[str] = (),
    ) -> list[str]:
        """Compare the checkpoint's tensors with a network's parameters; no weight is read.

        Args:
            parameters: what the network needs, by published name; also on the `meta` device.
            strict: False forgives, with a warning, what is missing or unexpected.
            config: the options that were asked for, where they may be others than the checkpoint's.
            rounded: names that must be there even so, as random weights cannot be rounded.

        Returns:
            Names of the parameters that are missing.

        Raises:
            CheckpointError: the weights are not there, broken, or not this network's.
        """
        manifest.check_weights(self.source, {stored.name: stored.digest for stored in self.own.values()})
        if config is not None:
            if (run := self.of_run(config)) is not self:
                adapters.check_base(run.source, self.source, self.own)
            config.call_after_save(partial(adapters.record, self.source.identity, self.own))
        missing = check_tensors(self.source.place, parameters, self.tensors, strict, lambda: self._advice(config))
        if nowhere := [name for name in missing if name in rounded]:
            raise MismatchedCheckpointError(
                f"{self} lacks {len(nowhere)} weights of the VLM, such as {min(nowhere)}; they would be random, which "
                "vlm_quantization does not round, and which context_cache does not train: leave the option out"
            )
        return missing

    def read(self, module: nn.Module, device: torch.device, with_digests: bool = False) -> dict[str, str]:
        """Fill a module that was built on the `meta` device, each parameter in the dtype it has there.

        What the checkpoint lacks (`check` returns it) is left as it is.

        Args:
            device: where the weights go.
            with_digests: a save will leave frozen weights to this checkpoint, and needs their digests.

        Returns:
            Digests, by name, of the weights that a save of the trained ones may leave to the base, as its files hold
            them; empty if nobody will ask, as hashing costs time.

        Raises:
            CheckpointError: a weight is broken, or is not the one that the checkpoint was saved with; `module` is
                then of no use.
        """
        started = time.perf_counter()
        wanted = dict(module.named_parameters())
        hashed: set[str] = set()
        if self._base is not None:
            hashed = wanted.keys() - self.own.keys()
        elif with_digests:
            hashed = {name for name, p in wanted.items() if not p.requires_grad}
        names = wanted.keys() & self.tensors.keys()
        digests = fill(module, names, self.tensors, device, hashed)
        if self._base is not None and digest_of_json(digests) != self._base.digest:
            raise CorruptCheckpointError(
                f"{self} holds trained weights alone, over the frozen ones of {self._base.id} (revision "
                f"{self._base.revision}); but what is missing in it has the digest {digest_of_json(digests)} there, "
                f"not {self._base.digest}: the base has changed since, or weights were taken out"
            )
        if self.source.has_changed():
            raise manifest.being_written(self.source)
        seconds = time.perf_counter() - started
        logger.info("loaded %d of %s from %s in %.1f s", len(names), _summary(wanted), self, seconds)
        return digests

    def read_vlm(self, module: nn.Module, config: PI0Config) -> None:
        """Fill the VLM of a module on the `meta` device; the checkpoint is a PaliGemma of transformers.

        transformers may pad the vocabulary; the rows beyond ours belong to no token and are left out.

        Raises:
            CheckpointError: the checkpoint is not there, broken, or not a PaliGemma of the preset's size.
        """
        started = time.perf_counter()
        wanted = {name: p for name, p in module.named_parameters() if name.startswith(VLM)}
        found = index_tensors(self._weight_files(), prefix=VLM)
        rows, width = wanted[EMBEDDING].shape
        embedding = found.get(EMBEDDING)
        if embedding is not None and embedding.shape[0] > rows:
            found[EMBEDDING] = embedding._replace(shape=(rows, *embedding.shape[1:]), digest=None)  # of all rows
        if report := describe_differences(wanted, found):
            raise MismatchedCheckpointError(
                f"vlm_path={self} is not the VLM of paligemma_variant={config.paligemma_variant} for images of "
                f"{config.image_size} pixels. {report}. Take PaliGemma 1 of that size in transformers' format, such "
                f"as google/paligemma-3b-pt-224 ({rows} x {width} embeddings or more)"
            )
        fill(module, wanted, found, torch.device(str(config.device)))
        logger.info("the VLM is %s's (%d tensors, %.1f s)", self, len(wanted), time.perf_counter() - started)

    def _weight_files(self) -> list[Path]:
        self._finish_save()  # it may have been committed since the checkpoint was opened
        if not (files := self.source.weight_files()):
            self._refuse_adapter()
            raise CheckpointNotFoundError(f"{self} holds no {SAFETENSORS_SINGLE_FILE}: is it `pretrained_model`?")
        return files

    def _refuse_adapter(self) -> None:
        if self.source.file(ADAPTER_CONFIG_NAME) is not None:
            raise WrongPolicyError(
                f"{self} holds a PEFT adapter, not a model. LeRobot's commands and `lerobot-pi0 serve` load it over "
                "its base; in code, call lerobot.policies.make_policy, or merge the two (examples/merge_adapter.py)"
            )

    def _adapts_vlm(self) -> bool:
        """Whether this is a PEFT adapter that has weights for the VLM."""
        file = self.source.file(ADAPTER_WEIGHTS_NAME)
        found = {} if file is None else index_tensors([file], prefix="adapter.")
        return any(VLM.removeprefix("model.") in name for name in found)

    def _advice(self, config: PI0Config | None) -> str:
        """For weights that do not fit: what the checkpoint's own config.json says otherwise."""
        if config is not None and (made := self.raw_config()):
            asked = config.to_files()[CONFIG_NAME]
            differing = [name for name in SHAPING if made.get(name, asked[name]) != asked[name]]
            if differing:
                return "The checkpoint was made with " + " ".join(f"--policy.{x}={made[x]}" for x in differing)
        return general_advice()


def _summary(parameters: Mapping[str, Tensor]) -> str:
    numbers = sum(p.numel() for p in parameters.values()) / 1e9
    kinds = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()}))
    return f"{len(parameters)} tensors ({numbers:.2f} B parameters, {kinds})"

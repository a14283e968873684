"""Conversion of LeRobot's batch into the network's `Observation`, and all checks of a batch.

Axes: B batch, N cameras, C channels, H height, W width, L prompt tokens, T steps of a chunk, A dims.

The checks need facts about values (range of the images, length of the prompts). These are gathered on the device and
copied to the host together: one synchronisation per batch, before any compiled function runs.
"""

import logging
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.policies.common.vla_utils import pad_vector
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..network.pi0 import Observation
from .features import padded
from .samples import IS_PAD, ObservationError

logger = logging.getLogger(__name__)


Augment = Callable[[Tensor, list[str], list[int] | None], Tensor]
"""(images (B, N, C, H, W) in [0, 1], keys of the cameras, index of each sample in its dataset) -> images."""


def resize_with_pad(images_BCHW: Tensor, side: int, antialias: bool = False) -> Tensor:
    """Scale into a square of `side` pixels without distortion, centred; the rest is black. Values stay in [0, 1].

    Args:
        antialias: when shrinking, average all old pixels that a new pixel covers, as openpi's training does
            (`resize_with_pad` of its image_tools). False interpolates between the nearest four pixels, as
            `resize_with_pad_torch` does in LeRobot and in openpi's PyTorch model.
    """
    height, width = images_BCHW.shape[-2:]
    if (height, width) == (side, side):
        return images_BCHW
    rows, columns = placed(height, width, side)
    size = (rows.stop - rows.start, columns.stop - columns.start)
    images = F.interpolate(images_BCHW, size=size, mode="bilinear", align_corners=False, antialias=antialias)
    return F.pad(images.clamp(0, 1), (columns.start, side - columns.stop, rows.start, side - rows.stop))


def placed(height: int, width: int, side: int) -> tuple[slice, slice]:
    """The rows and columns of a square of `side` pixels into which `resize_with_pad` puts a picture of this size."""
    ratio = max(height, width) / side
    size = (int(height / ratio), int(width / ratio))
    top, left = ((side - x) // 2 for x in size)
    return slice(top, top + size[0]), slice(left, left + size[1])


def bucket(length: int, most: int) -> int:
    """The first of 16, 32, 64, … that holds `length`, at most `most`: so a compiled network sees few lengths."""
    return min(max(16, 1 << (length - 1).bit_length()), most)


OF_BASES = (224, 224)
"""Size of pictures in the configs of published bases, whatever they were trained on: it says nothing of a camera."""


class ObservationMaker:
    """Makes observations for one policy; remembers which warnings it has given."""

    def __init__(self, config: PI0Config) -> None:
        self.config = config
        self.padded: list[str] | None = None
        """Keys of the state and the actions that may be padded, or absent; None: those that look so in the config."""
        self._warned: set[str] = set()
        self._vocabulary = config.architecture().vlm.vocab_size

    def __call__(self, batch: Mapping[str, Any], device: torch.device) -> Observation:
        """Check a preprocessed batch and convert it into the network's inputs.

        Raises:
            ObservationError: a key is missing, has the wrong shape, or holds values out of range.
        """
        return self.with_index(batch, device)[0]

    def with_index(
        self, batch: Mapping[str, Any], device: torch.device, augment: Augment | None = None
    ) -> tuple[Observation, list[int] | None]:
        """The observation, and the indices of the samples in their dataset, which reach the host in the same copy.

        Args:
            augment: changes the images, see `Augment`.

        Raises:
            ObservationError: a key is missing, has the wrong shape, or holds values out of range.
        """
        cameras = self._cameras(batch, device)
        state = self._state(batch, len(next(iter(cameras.values()))), device)
        tokens, mask = self._prompt(batch, len(state), device)
        for key, image in cameras.items():
            if len(image) != len(state):
                raise ObservationError(f"{key!r} holds {len(image)} images for {len(state)} states")
        facts, index = self._facts(cameras, tokens, mask, state, batch.get("index"))
        self._check_facts(facts, batch, cameras)
        longest = int(facts["longest prompt"])
        if self.config.compile_model:
            longest = bucket(longest, tokens.shape[1])
        change = None if augment is None else lambda images, keys: augment(images, keys, index)
        made = self.assemble(cameras, tokens[:, :longest], mask[:, :longest], state, change)
        # CPUs always get a mask: they have no faster kernel without one, and the sums would differ in the last bit.
        return made._replace(padded=device.type == "cpu" or facts["shortest prompt"] < longest), index

    def assemble(
        self,
        cameras: Mapping[str, Tensor],
        tokens_BL: Tensor,
        mask_BL: Tensor,
        state: Tensor,
        augment: Callable[[Tensor, list[str]], Tensor] | None = None,
    ) -> Observation:
        """An observation from tensors that were checked, images (B, 3, H, W) in [0, 1]; reads no value from them."""
        side, antialias = self.config.image_size, self.config.image_resize == "openpi"
        images = torch.stack([resize_with_pad(x, side, antialias) for x in cameras.values()], dim=1)
        if augment is not None:
            images = augment(images, list(cameras))
        return Observation(
            images_BNCHW=images * 2 - 1,
            tokens_BL=tokens_BL,
            token_mask_BL=mask_BL,
            state_BA=pad_vector(state, self.config.max_state_dim),
        )

    def actions(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """The recorded chunk, zero-padded: float32 (B, T, A).

        Raises:
            ObservationError: there are no actions, too many dims, or not `chunk_size` steps.
        """
        actions = self._vector(batch, ACTION, (self.config.max_action_dim, "max_action_dim"), device, ndim=3)
        if actions.shape[1] != self.config.chunk_size:
            raise ObservationError(
                f"{ACTION!r} holds {actions.shape[1]} steps, chunk_size is {self.config.chunk_size}: load the "
                "dataset with the delta_timestamps of this config, as lerobot-train does"
            )
        return pad_vector(actions, self.config.max_action_dim)

    def valid(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """Which steps of the chunks lie within their episodes, boolean (B, T): LeRobot repeats an episode's last
        action beyond its end.

        Raises:
            ObservationError: the batch has no `action_is_pad`, or one whose shape is not that of the actions.
        """
        if IS_PAD not in batch:
            raise ObservationError(
                f"no {IS_PAD!r} in the batch, which mask_padded_actions needs: LeRobotDataset has it"
            )
        is_pad, shape = torch.as_tensor(batch[IS_PAD]), tuple(batch[ACTION].shape[:2])
        if is_pad.shape != shape:
            raise ObservationError(f"{IS_PAD!r} has shape {tuple(is_pad.shape)}, expected (batch, steps) = {shape}")
        return ~is_pad.to(device, torch.bool)

    def _state(self, batch: Mapping[str, Any], batch_size: int, device: torch.device) -> Tensor:
        """The state; zeros for a policy that was trained without one."""
        if OBS_STATE in batch or not self._is_padded(OBS_STATE):
            return self._vector(batch, OBS_STATE, (self.config.max_state_dim, "max_state_dim"), device)
        self._warn(f"no {OBS_STATE!r} in the batch: the policy acts on images and the task alone", "no state")
        return torch.zeros(batch_size, self.config.max_state_dim, device=device)

    def _is_padded(self, key: str) -> bool:
        return key in (padded(self.config) if self.padded is None else self.padded)

    def _vector(
        self, batch: Mapping[str, Any], key: str, most: tuple[int, str], device: torch.device, ndim: int = 2
    ) -> Tensor:
        if key not in batch:
            raise ObservationError(f"no {key!r} in the batch, which has {', '.join(map(repr, batch))}")
        x = torch.as_tensor(batch[key])
        if x.ndim != ndim:
            axes = "(batch, dims)" if ndim == 2 else "(batch, steps, dims)"
            remedy = (
                "load the dataset with the delta_timestamps of this config, as lerobot-train does"
                if key == ACTION
                else "LeRobot's preprocessor adds the batch dimension of a single observation"
                if x.ndim < ndim
                else "remove other dimensions, such as that of several observation steps"
            )
            raise ObservationError(f"{key!r} has shape {tuple(x.shape)}, expected {axes}: {remedy}")
        if x.shape[-1] > most[0]:
            raise ObservationError(
                f"{key!r} has {x.shape[-1]} dims, the network has room for {most[0]} ({most[1]}): train with a "
                f"larger {most[1]}, from scratch, or leave dims out of the dataset"
            )
        feature = (self.config.output_features if key == ACTION else self.config.input_features).get(key)
        if feature is not None and tuple(feature.shape) != (x.shape[-1],) and not self._is_padded(key):
            raise ObservationError(
                f"{key!r} has {x.shape[-1]} dims, the policy's config says {tuple(feature.shape)}: this is "
                "another robot, or another order of joints, than the policy was trained for"
            )
        return x.to(device, torch.float32)

    def _cameras(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        expected = list(self.config.image_features)
        present = [key for key in expected if key in batch]
        if not present:
            raise ObservationError(
                f"no camera in the batch: expected at least one of {expected or 'observation.images.*'}, got "
                f"{', '.join(map(repr, batch))}. Rename cameras with --rename_map, or name them as in training"
            )
        absent = [key for key in expected if key not in batch and "empty_camera" not in key]
        if absent:
            self._warn(f"cameras {absent} are absent: the policy acts without them", "absent cameras")
        images = {key: self._image(key, torch.as_tensor(batch[key]).to(device)) for key in present}
        for key, x in images.items():
            self._compare_size(key, tuple(x.shape[2:]))
        return images

    def _compare_size(self, key: str, size: tuple[int, ...]) -> None:
        """Warn of pictures that are larger or smaller than the config's: shrinking makes them others."""
        shape = tuple(self.config.image_features[key].shape)
        known = shape[1:] if shape[0] == 3 else shape[:2]
        if size != known and known != OF_BASES:
            self._warn(
                f"{key!r} has pictures of {' × '.join(map(str, size))} pixels, the policy's config says "
                f"{' × '.join(map(str, known))}. If it was trained on those, record or render that size: resized, "
                "small things look different",
                f"size of {key}",
            )

    def _image(self, key: str, x: Tensor) -> Tensor:
        """The images with channels first, float32, in [0, 1] if the batch keeps LeRobot's contract."""
        if x.ndim != 4 or 3 not in (x.shape[1], x.shape[-1]):
            single = "LeRobot's preprocessor adds the batch dimension of a single one"
            remedy = single if x.ndim == 3 else "one per sample"
            raise ObservationError(
                f"{key!r} has shape {tuple(x.shape)}, expected (batch, 3, height, width): images in RGB; {remedy}"
            )
        if x.shape[1] != 3:
            x = x.permute(0, 3, 1, 2)
        return x.float() / 255 if x.dtype == torch.uint8 else x.float()

    def _prompt(self, batch: Mapping[str, Any], batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
            if key not in batch:
                raise ObservationError(
                    f"no {key!r} in the batch: the preprocessor makes it from 'task'. Run it, and give an "
                    "instruction (--task=… in lerobot-rollout)"
                )
        tokens = torch.as_tensor(batch[OBS_LANGUAGE_TOKENS]).to(device)
        mask = torch.as_tensor(batch[OBS_LANGUAGE_ATTENTION_MASK]).to(device, torch.bool)
        if tokens.shape != mask.shape or tokens.ndim != 2 or len(tokens) != batch_size:
            raise ObservationError(
                f"{OBS_LANGUAGE_TOKENS!r} has shape {tuple(tokens.shape)} and its mask {tuple(mask.shape)}, "
                f"expected ({batch_size}, tokens) for both"
            )
        task = batch.get("task")
        prompts = [task] if isinstance(task, str) else task or []
        if any(isinstance(p, str) and not p.strip() for p in prompts):
            self._warn(
                "'task' is empty, so the policy acts without an instruction, as LeRobot's own π₀ does. Give one in the "
                "words of the training data: --task in lerobot-rollout and in the robot's client, "
                "--dataset.single_task when recording. lerobot-eval takes it from the environment, and some, such as "
                "PushT, have none",
                "empty task",
            )
        return tokens, mask

    def _facts(
        self, cameras: dict[str, Tensor], tokens: Tensor, mask: Tensor, state: Tensor, index: Any
    ) -> tuple[dict[str, Any], list[int] | None]:
        """Numbers about the values, and the samples' indices, copied from the device in one tensor of integers.

        float32 numbers travel as integers with the same bits. float64 could hold all of them, but some devices lack it.
        """
        lengths = mask.sum(dim=1)
        last_token = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)
        numbers = {"state is finite": state.isfinite().all().float()}
        for key, image in cameras.items():
            low, high = image.aminmax()
            numbers |= {f"{key} low": low, f"{key} high": high}
        bits = torch.stack([*numbers.values()]).to(torch.float).view(torch.int32).long()
        parts = [torch.stack([*tokens.long().aminmax(), last_token.max(), lengths.min()]), bits]
        if index is not None:
            index = torch.as_tensor(index).reshape(-1)
            if index.device == bits.device and not index.is_floating_point():
                parts.append(index.long())
        lowest, highest, longest, shortest, *rest = torch.cat(parts).tolist()
        values = struct.unpack(f"={len(bits)}f", struct.pack(f"={len(bits)}i", *rest[: len(bits)]))
        facts = {"longest prompt": longest, "shortest prompt": shortest, "tokens": (lowest, highest)}
        facts |= dict(zip(numbers, values, strict=True))
        if index is None or len(parts) == 3:
            return facts, None if index is None else rest[len(bits) :]
        return facts, index.tolist()

    def _check_facts(self, facts: dict[str, Any], batch: Mapping[str, Any], cameras: dict[str, Tensor]) -> None:
        if not facts["state is finite"]:
            raise ObservationError(f"{OBS_STATE!r} holds NaN or infinity: check the robot's readings and its bus")
        if facts["shortest prompt"] < 1:
            raise ObservationError("a prompt has no tokens: π₀ needs an instruction in 'task'")
        lowest, highest = facts["tokens"]
        if not 0 <= lowest <= highest < self._vocabulary:
            raise ObservationError(
                f"{OBS_LANGUAGE_TOKENS!r} holds tokens from {lowest} to {highest}, and the network knows "
                f"{self._vocabulary}: the tokenizer is not the one of training. Download or copy the checkpoint again"
            )
        limit = self.config.tokenizer_max_length or 0
        if facts["longest prompt"] >= limit:
            self._warn(
                f"a prompt fills all {limit} tokens and was probably cut: shorten the "
                "instruction, or train with a larger tokenizer_max_length",
                "cut prompt",
            )
        for key in cameras:
            low, high = facts[f"{key} low"], facts[f"{key} high"]
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true of NaN
                raise ObservationError(
                    f"{key!r} holds values from {low:g} to {high:g}, expected [0, 1]: divide 8-bit images by "
                    "255 (LeRobot does), and do not normalise them (normalization_mapping VISUAL is IDENTITY)"
                )

    def _warn(self, message: str, once_as: str) -> None:
        if once_as not in self._warned:
            self._warned.add(once_as)
            logger.warning(message)

"""Policies that benchmarks compare, in one process and at any size: this one, LeRobot's built-in and transformers'.

Classes are imported directly, so it does not matter which of them the policy type "pi0" means. Weights are random, but
billions of draws would take too long: one random block is repeated (`RandomWeights`). With a cache around it, ours and
the built-in share the memory of each weight that they hold in the same dtype, so the full size fits on a small machine.

Axes: B batch, N cameras, L prompt tokens, T steps of a chunk.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import lerobot.policies.pi0.modeling_pi0 as lerobot_modeling
import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import init_empty_weights
from lerobot.policies.pi0.configuration_pi0 import PI0Config as BuiltinConfig
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from presets import CAMERAS, DIMS, Size, features, make_batch, presets
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import GemmaConfig, PaliGemmaConfig, PI0ForConditionalGeneration, SiglipVisionConfig
from transformers import PI0Config as TransformersConfig

from lerobot_pi0 import PI0Config, PI0Policy
from lerobot_pi0.control.sampling import Sampler
from lerobot_pi0.kernels import absent, rounding
from lerobot_pi0.network import flow, init
from lerobot_pi0.network.sizes import GemmaSize

CHUNK = 50
PROMPT = 48

Policy = PI0Policy | lerobot_modeling.PI0Policy
MakeWeight = Callable[[str, torch.Size, torch.dtype], Tensor]


class RandomWeights:
    """Makes weights by repeating one block of normal numbers: equal for both policies, and fast at any size.

    They are not zeros, because the operating system need not store these.
    """

    def __init__(self, std: float = 0.02, block: int = 1_000_003) -> None:
        draw = torch.Generator().manual_seed(0)
        self._block = (torch.randn(block, generator=draw) * std).bfloat16()

    def __call__(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        flat = torch.empty(shape.numel(), dtype=dtype)
        for part in flat.split(len(self._block)):
            part.copy_(self._block[: len(part)])
        return flat.view(shape)


class NoWeights:
    """Makes weights with shapes and dtypes but without memory. Results that are computed with them have none either."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __call__(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with self._mode:
            return torch.empty(shape, dtype=dtype)


def _config(cls: type, size: Size, dtype: str, train_expert_only: bool | None, **options):
    side = size.vlm.vision.image_size
    return cls(
        **features(size=side),
        device="cpu",
        dtype=dtype,
        image_resolution=(side, side),
        tokenizer_max_length=PROMPT,
        train_expert_only=train_expert_only,
        **options,
    )


def with_weights(policy: Policy, make: MakeWeight, training: bool) -> Policy:
    """The policy with weights that `make` makes."""
    rounded = rounding.layers(policy)
    for name, layer in rounded.items():
        layer.put(make(name, layer.weight.shape, layer.dtype))
    others = rounded.keys() | absent.names(policy)
    weights = {name: make(name, p.shape, p.dtype) for name, p in policy.named_parameters() if name not in others}
    policy.load_state_dict(weights, assign=True, strict=False)
    return policy.train(training)


class Ours:
    """This package's policy."""

    @staticmethod
    def config(size: Size, dtype: str, frozen: bool | None, **options) -> PI0Config:
        """Its options; to be called within `presets`."""
        return _config(PI0Config, size, dtype, frozen, **options)

    @classmethod
    def build(
        cls,
        size: Size,
        make: MakeWeight,
        dtype: str = "float32",
        frozen: bool = True,
        training: bool = False,
        rounded: bool = False,
        **options,
    ) -> PI0Policy:
        """The policy with weights by `make`. `frozen`: train only the expert; `rounded`: the VLM is in int8."""
        with presets(size), mock.patch.object(init, "initialise"):
            policy = PI0Policy(cls.config(size, dtype, frozen, **options))
        if rounded:
            rounding.prepare(policy.model, "int8")
        return with_weights(policy, make, training)

    @staticmethod
    def loss(policy: PI0Policy, batch: dict[str, Tensor]) -> Tensor:
        """The loss, without the numbers for the log, which tensors without memory do not have."""
        return policy.losses(batch).mean()

    @staticmethod
    def chunk(policy: PI0Policy, batch: dict[str, Tensor]) -> Tensor:
        """A chunk, without the check that it is finite, which tensors without memory cannot answer."""
        net, steps = policy.model, policy.config.num_inference_steps
        obs = policy.observe(batch, torch.device("cpu"))
        noise = flow.sample_noise((len(obs.state_BA), 1, CHUNK, policy.config.max_action_dim), torch.device("cpu"))
        with torch.no_grad():
            return Sampler().chunk(net, obs, noise, steps=steps)


class Builtin:
    """LeRobot's policy."""

    @staticmethod
    def build(
        size: Size, make: MakeWeight, dtype: str = "float32", frozen: bool = True, training: bool = False
    ) -> lerobot_modeling.PI0Policy:
        """The policy with weights by `make`. `frozen`: train only the expert."""
        stay = mock.patch.object(lerobot_modeling.PI0Pytorch, "to", lambda self, device: self)
        with presets(size), init_empty_weights(), stay:
            policy = lerobot_modeling.PI0Policy(_config(BuiltinConfig, size, dtype, frozen))
        return with_weights(policy, make, training)

    @staticmethod
    def _inputs(policy: lerobot_modeling.PI0Policy, batch: dict[str, Tensor]) -> tuple:
        images, masks = policy._preprocess_images(batch)
        prompt = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        return images, masks, *prompt, policy.prepare_state(batch)

    @classmethod
    def loss(cls, policy: lerobot_modeling.PI0Policy, batch: dict[str, Tensor]) -> Tensor:
        """The loss, without the numbers for the log, which tensors without memory do not have."""
        inputs, actions = cls._inputs(policy, batch), policy.prepare_action(batch)
        noise, time = torch.randn_like(actions), torch.rand(len(actions))
        return policy.model(*inputs, actions, noise, time)[..., :DIMS].mean()

    @classmethod
    def chunk(cls, policy: lerobot_modeling.PI0Policy, batch: dict[str, Tensor]) -> Tensor:
        """A chunk."""
        return policy.model.sample_actions(*cls._inputs(policy, batch))


class Transformers:
    """transformers' π₀, which has no policy around it. It only makes chunks, from inputs without unneeded tokens."""

    @staticmethod
    def _gemma(cfg: GemmaSize, vocab_size: int) -> GemmaConfig:
        return GemmaConfig(
            hidden_size=cfg.width,
            num_hidden_layers=cfg.depth,
            intermediate_size=cfg.mlp_dim,
            head_dim=cfg.head_dim,
            num_attention_heads=cfg.heads,
            num_key_value_heads=1,
            vocab_size=vocab_size,
        )

    @classmethod
    def build(
        cls, size: Size, make: MakeWeight, dtype: str = "float32", frozen: bool = True, training: bool = False
    ) -> PI0ForConditionalGeneration:
        """The model with weights by `make`.

        Raises:
            ValueError: for training.
        """
        if training:
            raise ValueError("of transformers' π₀ only chunks can be measured, not training")
        vision, words = size.vlm.vision, size.vlm.vocab_size
        siglip = SiglipVisionConfig(
            hidden_size=vision.width,
            num_hidden_layers=vision.depth,
            intermediate_size=vision.mlp_dim,
            num_attention_heads=vision.heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
            projection_dim=size.vlm.gemma.width,
        )
        vlm = PaliGemmaConfig(
            text_config=cls._gemma(size.vlm.gemma, words),
            vision_config=siglip,
            image_token_id=words,
            projection_dim=size.vlm.gemma.width,
        )
        config = TransformersConfig(vlm_config=vlm, dit_config=cls._gemma(size.expert, words))
        with init_empty_weights():
            model = PI0ForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
        parameters = {k: p for k, p in model.named_parameters() if k != "model.dit.embed_tokens.weight"}  # never read
        model.load_state_dict({k: make(k, p.shape, p.dtype) for k, p in parameters.items()}, assign=True, strict=False)
        model.predict_action_chunk = partial(cls.chunk, model)
        return model.eval()

    @staticmethod
    def chunk(model: PI0ForConditionalGeneration, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """A chunk of 32 dims: cameras that exist, and the prompt without padding."""
        dtype, vlm = model.dtype, model.config.vlm_config
        images = torch.stack([batch[key] for key in CAMERAS if key in batch], dim=1) * 2 - 1
        most = int(batch[OBS_LANGUAGE_ATTENTION_MASK].sum(dim=1).max())
        patches = (vlm.vision_config.image_size // vlm.vision_config.patch_size) ** 2
        places = torch.full((len(images), images.shape[1] * patches), vlm.image_token_id, device=images.device)
        words = torch.ones_like(places), batch[OBS_LANGUAGE_ATTENTION_MASK][:, :most].long()
        return model.sample_actions(
            state=F.pad(batch[OBS_STATE], (0, model.config.max_state_dim - DIMS)).to(dtype),
            pixel_values=images.to(dtype),
            pixel_attention_mask=torch.ones(images.shape[:2], dtype=torch.bool, device=images.device),
            input_ids=torch.cat([places, batch[OBS_LANGUAGE_TOKENS][:, :most]], dim=1),
            attention_mask=torch.cat(words, dim=1),
            noise=noise,
        )


SUBJECTS = {"ours": Ours, "built-in": Builtin, "transformers": Transformers, "K=1": Ours}


def batch_for(size: Size, cameras: int = 3, prompt: int = PROMPT, batch_size: int = 1) -> dict[str, Tensor]:
    """A random batch at this size: `cameras` of the three, `prompt` of the 48 tokens."""
    side, words = size.vlm.vision.image_size, size.vlm.vocab_size
    return make_batch(0, batch_size, CAMERAS[:cameras], (prompt,), DIMS, side, CHUNK, PROMPT, words)

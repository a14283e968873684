"""Attention of the action tokens: how much of it goes to each patch of a picture, each token of the prompt, and so on.

It is read from the queries of `PI0.velocity` and the keys in the KV cache, from outside of the network:

    with recorded(policy.model) as seen:
        policy.predict_action_chunk(batch)
    found = parts(seen.weights(), policy.observe(batch, device), policy.model)

The weights are softmax(q·k / √D) as each layer of the action expert computes it. They are averaged with equal shares
over query heads, action tokens, evaluations of the velocity (a solver's steps, flow samples) and layers.

What they are not: an explanation. They say from where values are copied, not what these do to the action. Softmax has
to put its weight somewhere, so tokens without content often collect much of it. And they show the direct path alone:
an earlier layer of the VLM may have moved what a patch shows into another patch's or word's token.

Axes: B batch, Q queries of all heads, G layers, S keys of the context and of the actions, N cameras, L prompt tokens,
D head dim.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor, nn

from ..configuration_pi0 import PI0Config
from ..inputs.observation import placed
from ..network.attention import KVCache, Mask
from ..network.pi0 import PI0, Observation


class Parts(NamedTuple):
    """The attention that each part of the input gets. The four parts of one observation sum to 1."""

    patches_BNHW: Tensor  # rows and columns of patches, of each camera
    prompt_BL: Tensor  # 0 on padding
    state_B: Tensor
    actions_B: Tensor  # what the action tokens give to each other

    def shares(self, cameras: list[str]) -> dict[str, float]:
        """The share of each camera, of the prompt, the state and the actions, as means over the batch."""
        pictures = self.patches_BNHW.sum(dim=(2, 3)).mean(dim=0).tolist()
        rest = {"prompt": self.prompt_BL.sum(dim=1), "state": self.state_B, "actions": self.actions_B}
        return dict(zip(cameras, pictures, strict=True)) | {name: float(x.mean()) for name, x in rest.items()}


class Recorder:
    """Sums of the attention of the calls of `velocity`, by layer."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}
        self.listens = False  # only within `velocity`: the expert's layers also compute the state's token

    def add(self, layer: int, q_BQD: Tensor, new: KVCache, mask: Mask | None, past: KVCache | None) -> None:
        """Add a layer's attention; the arguments after `layer` are those of `network.attention.attention`."""
        weights_BS = mean_weights(q_BQD, new, mask, past)
        before = self._sums.get(layer)
        self._sums[layer] = weights_BS if before is None else before + weights_BS
        self._calls[layer] = self._calls.get(layer, 0) + 1

    def by_layer(self) -> Tensor:
        """Means over the calls, float32 (G, B, S).

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self._sums:
            raise RuntimeError("no attention was recorded: sample a chunk with this model inside of the block")
        return torch.stack([self._sums[i] / self._calls[i] for i in sorted(self._sums)])

    def weights(self) -> Tensor:
        """Means over calls and layers, float32 (B, S); each row sums to 1."""
        return self.by_layer().mean(dim=0)


def mean_weights(q_BQD: Tensor, new: KVCache, mask: Mask | None, past: KVCache | None) -> Tensor:
    """softmax(q·k / √D + bias) of the action tokens' queries, as their mean: float32 (B, S)."""
    q_BQD = q_BQD.detach()
    keys_BSD = (new if past is None else past.append(new)).keys_BSD.detach()
    tokens, before = new.keys_BSD.shape[1], 0 if mask is None else mask.shared  # the state's token may run with them
    with torch.autocast(q_BQD.device.type, enabled=False):
        scores_BQS = q_BQD.float() @ keys_BSD.float().mT * q_BQD.shape[-1] ** -0.5
    if mask is not None:
        scores_BQS = scores_BQS + mask.bias.float()
    return scores_BQS[:, before * q_BQD.shape[1] // tokens :].softmax(dim=-1).mean(dim=1)


@contextmanager
def recorded(model: PI0) -> Iterator[Recorder]:
    """Record the attention of every `velocity` within the block; the numbers of the network do not change.

    Only the attention layers of this model's expert get another `attend`, and only until the block ends. Meanwhile the
    expert is not compiled, and a chunk is no CUDA graph. One thread may use the model.

    Raises:
        RuntimeError: the model is being recorded already.
    """
    if is_recorded(model):
        raise RuntimeError("this model's attention is being recorded already: one block at a time")
    seen = Recorder()
    with ExitStack() as stack:
        for i, layer in enumerate(model.expert.layers):
            stack.enter_context(_replaced(layer.self_attn, "attend", _listening(seen, i, layer.self_attn.attend)))
            if hasattr(layer, "compile_mode"):
                stack.enter_context(_replaced(layer, "compile_mode", None))
        stack.callback(model.expert.register_forward_pre_hook(lambda *_: _set(seen, True)).remove)
        stack.callback(model.expert.register_forward_hook(lambda *_: _set(seen, False), always_call=True).remove)
        yield seen


def is_recorded(model: PI0) -> bool:
    """Whether a block of `recorded` is open for this model."""
    return "attend" in vars(model.expert.layers[0].self_attn)


def _listening(seen: Recorder, layer: int, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend_and_record(q_BQD: Tensor, new: KVCache, mask: Mask | None = None, past: KVCache | None = None) -> Tensor:
        if seen.listens:
            seen.add(layer, q_BQD, new, mask, past)
        return attend(q_BQD, new, mask, past)

    return attend_and_record


def _set(seen: Recorder, listens: bool) -> None:
    seen.listens = listens


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own in place of its class's, or another one in place of its own."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)


def parts(weights_BS: Tensor, obs: Observation, model: PI0) -> Parts:
    """Split the weights of an observation's chunk by what their keys are."""
    cameras, prompt = obs.images_BNCHW.shape[1], obs.tokens_BL.shape[1]
    patches = model.vision.vision_model.embeddings.position_embedding.num_embeddings
    pictures, words, state, actions = weights_BS.tensor_split(
        [cameras * patches, cameras * patches + prompt, cameras * patches + prompt + 1], dim=1
    )
    grid = rearrange(pictures, "b (n h w) -> b n h w", n=cameras, h=math.isqrt(patches))
    return Parts(grid, words, state[:, 0], actions.sum(dim=1))


def on_picture(patches_HW: Tensor, patch: int, side: int, height: int, width: int) -> Tensor:
    """The weight of the patch that each pixel of a camera's picture falls into: float32 (height, width).

    The picture was scaled into a square of `side` pixels, in which a patch has `patch` by `patch` pixels. Pixels beyond
    the last whole patch, which the network does not see, get 0.
    """
    square = patches_HW.float().repeat_interleave(patch, dim=0).repeat_interleave(patch, dim=1)
    square = F.pad(square, (0, side - square.shape[1], 0, side - square.shape[0]))
    rows, columns = placed(height, width, side)
    return F.interpolate(square[None, None, rows, columns], size=(height, width), mode="nearest-exact")[0, 0]


def words(tokenizer: Any, tokens_L: list[int], weights_L: list[float]) -> list[tuple[str, float]]:
    """The words of a prompt without padding, in order, each with the sum of its tokens' weights.

    A space belongs to the word after it. A line break, and a token that is no text, such as the one with which a prompt
    begins, are words of their own.
    """
    special, text, begins = {*tokenizer.all_special_ids}, "", []
    for i, token in enumerate(tokens_L):
        longer = tokenizer.decode(tokens_L[: i + 1])
        if not i or {token, tokens_L[i - 1]} & special or longer[len(text) :][:1].isspace():
            begins.append(i)
        text = longer
    spans = list(zip(begins, [*begins[1:], len(tokens_L)], strict=True))
    return [(tokenizer.decode(tokens_L[a:b]).strip(" ") or " ", sum(weights_L[a:b])) for a, b in spans]


def words_of(tokenizer: Any, obs: Observation, found: Parts, row: int = 0) -> list[tuple[str, float]]:
    """`words` of one observation of a batch, whose parts were found."""
    real = obs.token_mask_BL[row].cpu()
    return words(tokenizer, obs.tokens_BL[row].cpu()[real].tolist(), found.prompt_BL[row].cpu()[real].tolist())


def heats(found: Parts, batch: Mapping[str, Any], config: PI0Config, row: int = 0) -> dict[str, Tensor]:
    """The weight at each pixel of the pictures of one observation, by camera: float32 (height, width) each.

    Args:
        batch: as the policy got it.
        row: which observation of the batch.
    """
    patch, found_by_key = config.architecture().vlm.vision.patch_size, {}
    for n, key in enumerate(key for key in config.image_features if key in batch):
        shape = batch[key].shape[-2:] if batch[key].shape[1] == 3 else batch[key].shape[1:3]
        found_by_key[key] = on_picture(found.patches_BNHW[row, n], patch, config.image_size, *shape)
    return found_by_key

"""Names of tensors and files in checkpoints: the published ones, and older spellings of them."""

import re

from torch import Tensor

NETWORK = "model.paligemma_with_expert."
VLM = NETWORK + "paligemma."
LM_HEAD = VLM + "lm_head.weight"
EMBEDDING = VLM + "model.language_model.embed_tokens.weight"
EXPERT_HEAD = NETWORK + "gemma_expert.lm_head.weight"

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
"""Files of a PEFT adapter."""

DIGESTS = "lerobot_pi0.digests"
CONFIG_DIGEST = "lerobot_pi0.config"
ACTING_OPTIONS = "lerobot_pi0.options"
"""Keys of a safetensors file's metadata: a digest per tensor, as JSON; one of the config.json written with it; and, as
JSON, the options of lerobot_pi0.json without which the policy would act otherwise."""

# Known spellings of the same tensors, applied in this order. What follows in `index_tensors`: the head of the VLM is
# its embedding, and the head of the expert is read by nothing.
RENAMES = (
    # openpi writes the network without LeRobot's policy around it
    (re.compile(r"^(?!model\.)"), "model."),
    # transformers before 4.52 nested PaliGemma's parts the other way round; 5.5 writes them with both nestings
    (re.compile(r"\.paligemma\.(model\.)?language_model\.model\."), ".paligemma.model.language_model."),
    (re.compile(r"\.paligemma\.language_model\.lm_head\."), ".paligemma.lm_head."),
    (re.compile(r"\.paligemma\.(vision_tower|multi_modal_projector)\."), r".paligemma.model.\1."),
)


def canonical_name(name: str) -> str:
    """The name that published checkpoints use today for a tensor of an older or bare one."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def published_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A policy's tensors as published checkpoints have them, complete for the built-in too.

    The embedding goes under the name of the VLM's head, from which the built-in fills both; the expert's head,
    which nothing reads but the built-in demands, is zeros.
    """
    state = dict(state)
    embedding = state.pop(EMBEDDING)
    width = len(state[NETWORK + "gemma_expert.model.norm.weight"])
    zeros = embedding.new_zeros(()).expand(len(embedding), width)  # one number: they take no memory
    return state | {LM_HEAD: embedding, EXPERT_HEAD: zeros}

"""LoRA's default targets and ranks: openpi's recipe (`models/gemma.py: gemma_2b_lora, gemma_300m_lora`).

Attention and MLP of VLM and expert get adapters, with rank and alpha of 16 in the VLM and of 32 in the expert; the
projections of states and actions are trained without adapters. (openpi also trains the vision tower, which stays frozen
with LeRobot's `--peft.*`.)
"""

from typing import Any

EXPERT = r".*\.gemma_expert\..*"
PROJECTIONS = ["state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out"]
LINEAR = r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


def targets(depth: int, with_vlm: bool, vlm_is_rounded: bool = False) -> dict[str, Any]:
    """peft's options for the expert and, if `with_vlm`, for those parts of the VLM's `depth` layers that π₀ uses.

    Raises:
        ValueError: the VLM would get adapters, but it is rounded.
    """
    if with_vlm and vlm_is_rounded:
        raise ValueError(
            "LoRA would adapt the VLM, which is rounded (vlm_quantization): give --policy.train_expert_only=true "
            "for LoRA in the expert alone, or leave vlm_quantization out"
        )
    last = depth - 1
    vlm = rf"|.*\.language_model\.layers\.((?!{last}\.)\d+\.{LINEAR}|{last}\.self_attn\.(k|v)_proj)"
    return {
        "target_modules": rf"(.*\.gemma_expert\..*\.{LINEAR}{vlm if with_vlm else ''})",
        "modules_to_save": list(PROJECTIONS),
    }


def with_ranks(overrides: dict[str, Any]) -> dict[str, Any]:
    """The options of `--peft.*` with defaults: alpha equals the rank, and the expert's rank is twice the VLM's.

    If target modules are named, all of them have the rank `--peft.r`.
    """
    if (overrides.get("method_type") or "lora").lower() != "lora":
        return overrides
    rank = overrides.get("r") or 16
    alpha = overrides.get("lora_alpha") or rank
    both = {"r": rank, "lora_alpha": alpha}
    if overrides.get("target_modules") is None:
        both |= {"rank_pattern": {EXPERT: 2 * rank}, "alpha_pattern": {EXPERT: 2 * alpha}}
    return overrides | both

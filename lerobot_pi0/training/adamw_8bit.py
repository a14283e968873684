"""bitsandbytes' 8-bit AdamW, made to stop and go on as LeRobot's training does.

    moment ≈ largest of its block of 256 · number of a code of 256 numbers        (arXiv 2110.02861)

A byte per moment and weight; weights with fewer than 4096 numbers keep theirs in float32. LeRobot writes an optimizer's
state to safetensors, which hold tensors alone, and each in memory of its own.
"""

from functools import cache
from typing import Any

import torch
from bitsandbytes import functional, optim
from torch._subclasses.fake_tensor import unset_fake_temporarily


@cache
def code(signed: bool) -> list[float]:
    """What a byte stands for; it has numbers even where memory is counted with tensors that have none."""
    with unset_fake_temporarily():
        return functional.create_dynamic_map(signed).tolist()


class AdamW8bit(optim.AdamW8bit):
    """With states that LeRobot can write, and with torch's hooks, which bitsandbytes forgets when it loads."""

    def fill_qmap(self) -> None:
        """The codes of both moments: the same for all weights."""
        self.name2qmap = {"dynamic": torch.tensor(code(True)), "udynamic": torch.tensor(code(False))}

    def state_dict(self) -> dict[str, Any]:
        """The state without the codes, and with the number of steps as a tensor."""
        saved = super().state_dict()
        for own in saved["state"].values():
            own["step"] = torch.tensor(own["step"])
            for name in ("qmap1", "qmap2"):
                own[self._FSDP_WRAPPED_QUANT_STATE_KEY].pop(name, None)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take a state that was saved, and call the hooks."""
        super().load_state_dict(state_dict, move_to_device)
        for p, own in self.state.items():
            own["step"] = int(own["step"])
            if own["state1"].dtype == torch.uint8:
                for name, kind in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
                    own[name] = self.name2qmap[kind] = self.name2qmap[kind].to(p.device)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

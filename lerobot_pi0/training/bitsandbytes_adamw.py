"""8-bit AdamW of bitsandbytes, with a state that LeRobot can save and resume. Importing this module needs bitsandbytes.

    moment ≈ largest magnitude in its block of 256 · one of 256 code values        (arXiv 2110.02861)

Each number of a weight has two moments, of one byte each; weights with fewer than 4096 numbers have float32 moments.
LeRobot saves an optimizer's state as safetensors. These can only hold tensors, and no two of them in the same memory.
"""

from functools import cache
from typing import Any

import torch
from bitsandbytes import functional, optim
from torch._subclasses.fake_tensor import unset_fake_temporarily


@cache
def code(signed: bool) -> list[float]:
    """The code value of each byte: real numbers even under `FakeTensorMode`."""
    with unset_fake_temporarily():
        return functional.create_dynamic_map(signed).tolist()


class AdamW8bit(optim.AdamW8bit):
    """bitsandbytes' AdamW8bit, whose state LeRobot can save, and which calls torch's hooks when it loads one."""

    def fill_qmap(self) -> None:
        """Make the codes of both moments, which all weights share."""
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
        """Load a saved state, then call torch's hooks, which bitsandbytes does not call."""
        super().load_state_dict(state_dict, move_to_device)
        for p, own in self.state.items():
            own["step"] = int(own["step"])
            if own["state1"].dtype == torch.uint8:
                for name, kind in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
                    own[name] = self.name2qmap[kind] = self.name2qmap[kind].to(p.device)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

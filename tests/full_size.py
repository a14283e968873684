"""Our network and LeRobot's at full size on the `meta` device, for tests that compare names and shapes."""

import lerobot.policies.pi0.modeling_pi0 as builtin
import pytest
import torch
from conftest import BuiltinPI0Config, features

from lerobot_pi0 import PI0Config
from lerobot_pi0.network.pi0 import PI0


class OnMeta(torch.nn.Module):
    """Our network inside a policy, without weights."""

    def __init__(self) -> None:
        super().__init__()
        config = PI0Config(device="cpu")
        with torch.device("meta"):
            self.model = PI0(config.architecture(), config.image_resolution[0])


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """LeRobot's own π₀ at full size, without weights. (Its constructor would move the network to a device.)"""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(builtin.PI0Pytorch, "to", lambda self, *args, **kwargs: self)
        return builtin.PI0Policy(BuiltinPI0Config(**features(size=224), device="cpu"))

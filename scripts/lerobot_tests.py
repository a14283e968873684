"""LeRobot's own tests, run with this plugin's `pi0` in place of the built-in, at sizes that fit on a laptop.

    git clone --branch v0.6.1 --depth 1 https://github.com/huggingface/lerobot
    make test-lerobot LEROBOT=lerobot [ARGS='tests/processor']

LeRobot's tests are in its repository, not in its package. Four things are changed for them, only in their process: the
tests of π₀ find this plugin's names in `lerobot.policies.pi0`; its two size presets are small; these tests run without
CUDA and without a token of the Hub; and a byte tokenizer replaces PaliGemma's gated one. With LEROBOT_PI0_TAKEOVER=0
the same tests run on LeRobot's own π₀, at the same sizes: a test that fails there too is not this plugin's fault.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = (
    "tests/policies/pi0_pi05/test_pi0.py", "tests/policies/pi0_pi05/test_pi0_rtc.py", "tests/policies/rtc",
    "tests/policies/test_relative_actions.py", "tests/processor", "tests/configs", "tests/jobs", "tests/optim",
    "tests/training", "tests/async_inference", "tests/test_rollout.py",
)  # fmt: skip
"""Tests that run by default: those that use policies. Robots, cameras and datasets do not use this plugin."""


OF_PI0 = ("test_pi0", "test_pi0_rtc")
"""The modules that test π₀ through its public names."""


def without_hardware(require: Callable) -> Callable:
    """LeRobot's decorator, which skips tests without hardware; not for tests of π₀, which are small here."""
    return lambda test: test if test.__module__.rsplit(".", 1)[-1] in OF_PI0 else require(test)


class Small:
    """A pytest plugin that makes the changes before the first test module is imported."""

    def pytest_configure(self) -> None:
        import pytest
        import transformers
        from presets import Size, set_presets

        from lerobot_pi0.configuration_pi0 import PALIGEMMA_TOKENIZER
        from lerobot_pi0.network.sizes import GemmaSize, PaliGemmaSize, VisionSize
        from tests import utils

        vision = VisionSize(width=32, depth=2, mlp_dim=48, heads=4, patch_size=56, image_size=224)
        vlm = PaliGemmaSize(vision, GemmaSize(width=48, depth=3, mlp_dim=64, heads=8, head_dim=16), vocab_size=512)
        self.patch = pytest.MonkeyPatch()
        set_presets(self.patch, Size(vlm, GemmaSize(width=32, depth=3, mlp_dim=40, heads=8, head_dim=16)))
        for name in ("require_cuda", "require_hf_token"):
            if hasattr(utils, name):
                self.patch.setattr(utils, name, without_hardware(getattr(utils, name)))
        fetch = transformers.AutoTokenizer.from_pretrained

        def from_pretrained(name: str, *args, **kwargs):
            return transformers.ByT5Tokenizer() if name == PALIGEMMA_TOKENIZER else fetch(name, *args, **kwargs)

        self.patch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)

    def pytest_collectstart(self, collector) -> None:
        """Put this plugin's classes into LeRobot's package for test modules of π₀, and LeRobot's for all others."""
        import lerobot.policies.pi0 as package
        from lerobot.policies.pi0.configuration_pi0 import PI0Config
        from lerobot.policies.pi0.modeling_pi0 import PI0Policy
        from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors

        import lerobot_pi0

        path = getattr(collector, "path", Path())
        ours = path.stem in OF_PI0 and os.environ.get(lerobot_pi0.TAKEOVER_VARIABLE, "1") != "0"
        for theirs in (PI0Config, PI0Policy, make_pi0_pre_post_processors):
            setattr(package, theirs.__name__, getattr(lerobot_pi0, theirs.__name__) if ours else theirs)

    def pytest_unconfigure(self) -> None:
        self.patch.undo()


def main(lerobot: Path, arguments: list[str]) -> int:
    """Run the tests; returns pytest's exit status."""
    if not (lerobot / "tests" / "processor").is_dir():
        raise SystemExit(f"{lerobot} has no tests: LEROBOT has to be a clone of LeRobot's repository")
    here = Path(__file__).absolute().parents[1]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.path[:0] = [str(lerobot.absolute() / "src"), str(lerobot.absolute()), str(here / "benchmarks")]
    sys.dont_write_bytecode = True
    os.chdir(lerobot)
    import pytest

    chosen = any(not argument.startswith("-") for argument in arguments)
    found = [] if chosen else [test for test in TESTS if Path(test).exists()]
    return pytest.main(
        [*found, "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning", *arguments], plugins=[Small()]
    )


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))

"""LeRobot's real `lerobot-rollout` with this policy and a stand-in robot: both kinds of inference."""

import functools
import itertools
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DIMS
from lerobot.scripts import lerobot_rollout
from stand_in import StandIn, save_policy
from torch import Tensor
from torch._dynamo.utils import counters

from lerobot_pi0 import PI0Policy
from lerobot_pi0.configuration_pi0 import choices

HORIZON = 12


@pytest.fixture(autouse=True)
def own_signals():
    """LeRobot's command takes ctrl-C for itself, and would keep it from the tests that follow."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def rollout(tmp_path, monkeypatch, capfd):
    """Run the command until its robot has received some actions. Returns the calls for a chunk (arguments, answer),
    what the robot was told, and the log."""

    def run(*args: str, policy: dict | None = None, actions: int = 16):
        save_policy(tmp_path / "checkpoint", **policy or {})
        chunks: list[tuple[dict, Tensor]] = []
        predict = PI0Policy.predict_action_chunk

        @torch.compiler.disable  # as the method itself is; `test_compile.py` has it as it is
        @functools.wraps(predict)
        def noted(self, batch, *positional, **kwargs):
            chunks.append((kwargs, predict(self, batch, *positional, **kwargs)))
            return chunks[-1][1]

        monkeypatch.setattr(PI0Policy, "predict_action_chunk", noted)
        monkeypatch.setattr(StandIn, "received", [])
        command = [
            "lerobot-rollout", "--strategy.type=base", f"--policy.path={tmp_path / 'checkpoint'}",
            "--policy.device=cpu", "--robot.type=stand_in", f"--robot.calibration_dir={tmp_path}", "--task=reach",
            "--fps=20", f"--robot.stop_after={actions}", "--duration=300", "--return_to_initial_position=false", *args,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        lerobot_rollout.main()
        return chunks, StandIn.received, capfd.readouterr().err

    return run


def test_sync(rollout):
    """Catches a policy that LeRobot's tick-by-tick loop cannot run, and a chunk that is not executed in its order."""
    chunks, received, log = rollout("--inference.type=sync", policy={"n_action_steps": 5})
    assert "SyncInferenceEngine started" in log
    assert len(received) == 16
    assert len(chunks) == 4
    assert all(goal.shape == (DIMS,) and np.isfinite(goal).all() for goal in received)
    chunk = chunks[0][1][0, :5].double().numpy()  # the postprocessor is affine, joint by joint
    for joint in range(DIMS):
        slope, start = np.polyfit(chunk[:, joint], np.array(received[:5])[:, joint], 1)
        assert np.allclose(slope * chunk[:, joint] + start, np.array(received[:5])[:, joint], atol=1e-3)


@pytest.mark.parametrize("guide", choices("rtc_guidance"))
def test_rtc(rollout, guide, monkeypatch):
    """Catches real-time chunking that LeRobot refuses, that fails in its thread (it logs and tries again), or whose
    leftovers do not arrive.

    Each inference takes 70 ms of the engine's clock, two ticks, however busy the machine is; so two chunks of 50 are
    not enough for 100 actions.
    """
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.07 * next(ticks), sleep=time.sleep)
    monkeypatch.setattr("lerobot.rollout.inference.rtc.time", clock)
    policy = {"rtc_training_max_delay": 20} if guide == "trained" else {"rtc_guidance": guide}
    chunks, _, log = rollout(
        "--inference.type=rtc", f"--inference.rtc.execution_horizon={HORIZON}", "--inference.queue_threshold=45",
        policy=policy, actions=100,
    )  # fmt: skip
    assert "RTC inference error" not in log
    assert f"rtc_guidance={guide}" in log
    assert len(chunks) > 2
    assert chunks[0][0]["prev_chunk_left_over"] is None
    assert {asked["inference_delay"] for asked, _ in chunks[1:]} == {2}
    for asked, chunk in chunks[1:]:
        left = asked["prev_chunk_left_over"]
        assert left.shape == (HORIZON, DIMS)
        assert torch.equal(chunk[0, :2], left[:2]) == (guide == "trained")


def test_an_option_from_the_command_line(rollout):
    """Catches options of the plugin that `--policy.…` does not reach when a checkpoint is run."""
    chunks, _, log = rollout(
        "--inference.type=rtc", "--policy.rtc_guidance=vjp", "--policy.solver=midpoint", "--policy.n_action_steps=7"
    )
    assert "rtc_guidance=vjp" in log
    assert "RTC inference error" not in log
    assert chunks


@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_torch_compile(rollout, monkeypatch, inference):
    """Catches `--use_torch_compile`, which sets `compile_model` and also wraps `predict_action_chunk`, compiling twice
    or not at all. The backend is traced, not Inductor, which the slow tests have."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    _, received, log = rollout(
        f"--inference.type={inference}", "--use_torch_compile=true", "--torch_compile_backend=aot_eager",
        "--compile_warmup_inferences=2", policy={"compile_mode": "default"},
    )  # fmt: skip
    torch._dynamo.reset()
    assert "RTC inference error" not in log
    assert len(received) == 16
    assert counters["stats"]["unique_graphs"] == (2 if inference == "sync" else 3)  # context, velocity; guided

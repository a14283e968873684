"""A user's whole workflow with this package, from the first recording to a robot that is served over the network.

    record -> check -> train -> SIGKILL -> resume -> open-loop -> rollout (sync, rtc) -> serve

    python tests/finish_line.py FOLDER

Each step is a command in its own process, on the virtual SO-100 arm. `test_finish_line.py` runs this file in an
environment that has the package from its wheel; `make finish` does the same. It stops at the first command that fails.
"""

import importlib.metadata
import json
import signal
import socket
import sys
import time
from pathlib import Path

from lerobot_env_virtual_so100 import audit
from lerobot_env_virtual_so100.cell import Cell
from lerobot_env_virtual_so100.commands import PATIENCE, Command
from lerobot_env_virtual_so100.constants import CAMERAS, FPS
from lerobot_env_virtual_so100.way import Way

REPO = "local/finish_line"
TINY = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny",
        "--policy.device=cpu"]  # fmt: skip
STEPS, SAVED = 30, 10
GOALS = 20
"""How many goal positions have to reach the servos while the policy is served."""


class Line:
    """The folder of a run, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.data, self.run = self.folder / "recorded", self.folder / "train"
        self.policy = self.run / "checkpoints" / "last" / "pretrained_model"
        self.dataset = [f"--dataset.repo_id={REPO}", f"--dataset.root={self.data}"]

    def start(self, *arguments: str, name: str, **environment: str) -> Command:
        return Command([str(argument) for argument in arguments], self.folder / "logs" / f"{name}.txt", environment)

    def do(self, *arguments: str, name: str) -> str:
        """Run a command to its end; returns its output."""
        command = self.start(*arguments, name=name)
        command.finish()
        return command.output()

    # Without an arm -------------------------------------------------------------------------------------------

    def check(self) -> None:
        page = self.folder / "check.html"
        said = self.do("lerobot-pi0", "check", *self.dataset, *TINY, f"--html={page}", name="check")
        assert "0 error" in said and page.read_text().count("<img ") == len(CAMERAS), said

    def train_kill_resume(self) -> None:
        """Train, end training with SIGKILL after a checkpoint, and resume from there to the last step."""
        options = [*self.dataset, *TINY, "--policy.push_to_hub=false", "--policy.n_action_steps=10", "--batch_size=4",
                   "--num_workers=0", f"--steps={STEPS}", f"--save_freq={SAVED}", "--log_freq=1",
                   "--wandb.enable=false", f"--output_dir={self.run}"]  # fmt: skip
        training, until = self.start("lerobot-train", *options, name="train"), time.monotonic() + PATIENCE
        while not self.policy.parent.exists():
            assert training.running and time.monotonic() < until, training.failure("wrote no checkpoint")
            time.sleep(0.02)
        assert training.running, "it ended before it could be killed: more steps are needed"
        training.stop()
        assert training.finish(check=False) == -signal.SIGKILL
        begun = self.step()
        assert 0 < begun < STEPS, begun
        self.do("lerobot-train", f"--config_path={self.policy}/train_config.json", "--resume=true", name="resume")
        assert self.step() == STEPS

    def step(self) -> int:
        """The step of the last checkpoint."""
        return json.loads((self.policy.parent / "training_state" / "training_step.json").read_text())["step"]

    def open_loop(self) -> None:
        out = self.folder / "open_loop"
        self.do("lerobot-pi0", "open-loop", f"--policy.path={self.policy}", "--policy.device=cpu", *self.dataset,
                "--observations=6", "--plots=1", f"--output_dir={out}", name="open_loop")  # fmt: skip
        assert json.loads((out / "report.json").read_text()) and (out / "report.html").stat().st_size > 0

    # With the arm ---------------------------------------------------------------------------------------------

    def record(self) -> None:
        with Cell(self.folder / "cell", calibrated=False) as cell:
            way = Way(cell)
            way.calibrate()
            (judgement,) = way.record([cell.task.sample("train", 3)], self.data, REPO)
            print("recorded:", "success" if judgement["is_success"] else "no success", flush=True)

    def rollout(self, cell: Cell, inference: str) -> None:
        cell.log("follower").write_text("")
        Way(cell).rollout(cell.task.sample("test", 1), self.policy, f"--inference.type={inference}")
        assert len(goals := audit.goals(cell.log("follower"))) >= GOALS, f"{len(goals)} goals reached the servos"

    def serve(self, cell: Cell) -> None:
        """`lerobot-pi0 serve` and LeRobot's own client, until the arm has been told to move."""
        cell.load(cell.task.sample("test", 2))
        cell.log("follower").write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = self.start("lerobot-pi0", "serve", f"--port={port}", f"--fps={FPS}", name="serve")
        server.wait_for("serving")
        # LeRobot's client knows network cameras only if their module has been imported.
        client_code = (
            "import lerobot.cameras.zmq\nfrom lerobot.async_inference.robot_client import async_client\nasync_client()"
        )
        client = self.start(
            sys.executable, "-c", client_code, f"--server_address=127.0.0.1:{port}", "--policy_type=pi0",
            f"--pretrained_name_or_path={self.policy}", "--policy_device=cpu", "--actions_per_chunk=20",
            f"--task={Way(cell).instruction(cell.task.sample('test', 2))}", f"--fps={FPS}", *cell.robot, name="client",
            **cell.environment,
        )  # fmt: skip
        until = time.monotonic() + PATIENCE
        while len(audit.goals(cell.log("follower"))) < GOALS:
            for side in (client, server):
                assert side.running and time.monotonic() < until, side.failure("moved no arm")
            time.sleep(0.2)
        client.interrupt()
        client.finish(check=False)
        server.interrupt()
        server.finish()


def origin() -> str:
    """Where this package comes from: the only distribution of its name has to be in this environment, not editable."""
    (ours,) = [d for d in importlib.metadata.distributions() if d.metadata["Name"] == "lerobot_policy_pi0"]
    for name in ("lerobot_policy_pi0", "lerobot_pi0", "lerobot_env_virtual_so100"):
        path = Path(__import__(name).__file__)
        assert path.is_relative_to(sys.prefix) and not path.is_symlink(), path
    assert ours.read_text("direct_url.json") is None or '"editable"' not in ours.read_text("direct_url.json")
    return f"lerobot_policy_pi0 {ours.version}, lerobot {importlib.metadata.version('lerobot')}, from {sys.prefix}"


def main(folder: Path) -> None:
    """Run all steps."""
    print(origin(), flush=True)
    line, begun = Line(folder), time.perf_counter()

    def done(what: str) -> None:
        print(f"{what}: done after {time.perf_counter() - begun:.0f} s", flush=True)

    for stage in (line.record, line.check, line.train_kill_resume, line.open_loop):
        stage()
        done(stage.__name__)
    with Cell(line.folder / "cell") as cell:
        for inference in ("sync", "rtc"):
            line.rollout(cell, inference)
            done(f"rollout, {inference}")
        line.serve(cell)
        done("serve")
    for log in line.folder.glob("**/logs/*.txt"):  # every command that has a policy says whose it is
        if any(word in log.name for word in ("train", "resume", "rollout")):
            assert "policy type 'pi0' is lerobot_policy_pi0" in log.read_text(errors="replace"), log
    print("the finish line is crossed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

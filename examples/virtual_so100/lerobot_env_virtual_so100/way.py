"""LeRobot's commands in the order in which a user with two SO-100 arms runs them, one function for each command.

    calibrate -> teleoperate -> record -> train -> rollout (base, episodic, dagger; sync, rtc) -> replay

The commands are LeRobot's, unchanged. What a person would do meanwhile is done by the cell (move the leader, set up the
scene) and by `Command` (press keys). The simulator judges success, at the moment when the arm loses its torque or the
episode ends.
"""

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

from .cell import Cell
from .commands import PATIENCE, Command, CommandError
from .constants import FPS, episode_steps
from .record import SCENES_FILE
from .tasks import Layout

logger = logging.getLogger(__name__)

NEXT, PAUSE, CORRECT = "n", " ", "\t"
_QUIET = ["--play_sounds=false", "--display_data=false"]
_TRIES = 3
"""While LeRobot connects, it waits 51 ms for a servo's reply, and tries only once: a busy machine may be too slow."""
_NO_LIMIT = 600  # s that an episode or a reset may take: `NEXT` ends them earlier


class Way:
    """Runs the commands in one cell; their logs go to its folder."""

    def __init__(self, cell: Cell, fps: int = FPS):
        self.cell, self.fps = cell, fps

    def _command(self, *arguments: str) -> Command:
        logs = self.cell.folder / "logs"
        log = logs / f"{len(list(logs.glob('*.txt'))) + 1:03d}_{arguments[0]}.txt"
        return Command([str(argument) for argument in arguments], log, self.cell.environment)

    def _wait_for_person(self, command: Command) -> None:
        """Wait until the person is done. Raises CommandError if the command ends before, or this takes too long."""
        until = time.monotonic() + PATIENCE
        while self.cell.status()["busy"]:
            if not command.running:
                raise command.failure("ended while the person was busy")
            if time.monotonic() > until:
                command.stop()
                raise command.failure(f"still runs, but the person was not done within {PATIENCE:.0f} s")
            time.sleep(0.05)

    def instruction(self, layout: Layout) -> str:
        """The instruction of a scene."""
        return self.cell.task.instruction(layout.target, layout.phrase)

    # Without a policy -----------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Write the calibration files into the servos, as `lerobot-calibrate` does after ENTER."""
        for options in (self.cell.blind, self.cell.teleop):
            command = self._command("lerobot-calibrate", *options)
            command.wait_for("Press ENTER")
            command.press("\n")
            command.finish()

    def teleoperate(self, layout: Layout) -> dict:
        """Let the person do the task through both arms; returns the judgement."""
        self.cell.load(layout)
        command = self._command("lerobot-teleoperate", *self.cell.robot, *self.cell.teleop, f"--fps={self.fps}",
                                "--display_data=false")  # fmt: skip
        command.wait_for("Teleop loop time")
        self.cell.demonstrate()
        self._wait_for_person(command)
        command.interrupt()
        command.finish()
        return self.cell.status()["judgement"]

    def record(self, layouts: list[Layout], root: Path, repo_id: str) -> list[dict]:
        """Record one episode for each scene with `lerobot-record`; returns the judgements.

        A run of the command has one instruction, so scenes are recorded in groups, the later ones with `--resume`.
        """
        judgements = []
        for words, group in self._groups(layouts).items():
            judgements += self._record_group(group, words, root, repo_id)
            with (root / SCENES_FILE).open("a") as file:
                for layout in group:
                    file.write(json.dumps({"task": self.cell.task.name, **asdict(layout)}) + "\n")
        return judgements

    def _groups(self, layouts: list[Layout]) -> dict[str, list[Layout]]:
        groups: dict[str, list[Layout]] = {}
        for layout in layouts:
            groups.setdefault(self.instruction(layout), []).append(layout)
        return groups

    def _record_group(self, layouts: list[Layout], words: str, root: Path, repo_id: str) -> list[dict]:
        self.cell.load(layouts[0])
        command = self._command("lerobot-record", *self.cell.robot, *self.cell.teleop, *_QUIET,
                                *self._dataset(root, repo_id, words, len(layouts)),
                                f"--resume={str(root.exists()).lower()}")  # fmt: skip
        judgements = []
        for index in range(len(layouts)):
            command.wait_for("Recording episode")
            self.cell.demonstrate()
            self._wait_for_person(command)
            judgements.append(self.cell.status()["judgement"])
            command.press(NEXT)
            if index + 1 < len(layouts):
                command.wait_for("Reset the environment")
                self._reset(command, layouts[index + 1])
                command.press(NEXT)
        command.finish()
        return judgements

    def _reset(self, command: Command, layout: Layout) -> None:
        """Set up the next scene while nothing is recorded. The arm moves first: it might be where a cube will be."""
        self.cell.bring(layout)
        self._wait_for_person(command)
        self.cell.load(layout, place=False)

    def _dataset(self, root: Path, repo_id: str, words: str, episodes: int) -> list[str]:
        return [f"--dataset.repo_id={repo_id}", f"--dataset.root={root}", "--dataset.no_stamp=true",
                f"--dataset.single_task={words}", f"--dataset.num_episodes={episodes}", f"--dataset.fps={self.fps}",
                f"--dataset.episode_time_s={_NO_LIMIT}", f"--dataset.reset_time_s={_NO_LIMIT}",
                "--dataset.video=false", "--dataset.push_to_hub=false"]  # fmt: skip

    def replay(self, root: Path, repo_id: str, episode: int) -> dict:
        """Replay a recorded episode in its own scene with `lerobot-replay`; returns the judgement."""
        scene = json.loads((root / SCENES_FILE).read_text().splitlines()[episode])
        scene.pop("task")
        self.cell.load(Layout(**scene))
        # lerobot-replay needs no cameras, and does not know network cameras.
        self._command("lerobot-replay", *self.cell.blind, "--play_sounds=false", f"--dataset.repo_id={repo_id}",
                      f"--dataset.root={root}", f"--dataset.episode={episode}").finish()  # fmt: skip
        return self.cell.status()["judgement"]

    # With a policy --------------------------------------------------------------------------------------------

    def _rollout(self, policy: Path, words: str, *options: str) -> Command:
        return self._command("lerobot-rollout", f"--policy.path={policy}", "--policy.device=cpu", f"--task={words}",
                             f"--fps={self.fps}", *self.cell.robot, *_QUIET, *options)  # fmt: skip

    @property
    def seconds(self) -> float:
        """Length of an episode."""
        return episode_steps(self.cell.task.name, self.fps) / self.fps

    def rollout(self, layout: Layout, policy: Path, *options: str) -> dict:
        """One scene with `--strategy.type=base`; returns the judgement. `options` are passed to the command."""
        # The arm stays where the policy brought it: the motion home would not be the policy's.
        arguments = ["--strategy.type=base", f"--duration={self.seconds}", "--return_to_initial_position=false"]
        for tries_left in reversed(range(_TRIES)):
            self.cell.load(layout)
            try:
                self._rollout(policy, self.instruction(layout), *arguments, *options).finish()
                break
            except CommandError as error:
                if not tries_left or not self.cell.status()["held"]:
                    raise
                logger.warning("the arm has not moved yet, so the command is run again: %s", error)
        return self.cell.status()["judgement"]

    def episodic(self, layouts: list[Layout], policy: Path, root: Path, repo_id: str, *options: str) -> list[dict]:
        """Record scenes of one instruction in one run with `--strategy.type=episodic`; returns the judgements.

        LeRobot brings the arm back to where it was at first, so all episodes start from the first scene's posture.
        """
        words = self.instruction(layouts[0])
        if any(self.instruction(layout) != words for layout in layouts):
            raise ValueError("lerobot-rollout takes one instruction for all episodes of a run")
        start = {"start_point": layouts[0].start_point, "start_noise": layouts[0].start_noise,
                 "start_gripper": layouts[0].start_gripper}  # fmt: skip
        layouts = [replace(layout, **start) for layout in layouts]
        self.cell.load(layouts[0])
        dataset = [
            option for option in self._dataset(root, repo_id, words, len(layouts)) if "episode_time" not in option
        ]
        command = self._rollout(policy, words, "--strategy.type=episodic", *dataset,
                                f"--dataset.episode_time_s={self.seconds}", *options)  # fmt: skip
        judgements = []
        for layout in layouts[1:]:
            command.wait_for("Reset the environment")
            judgements.append(self.cell.status()["judgement"])
            time.sleep(1.5)  # LeRobot takes a second for the way back
            self.cell.load(layout, place=False)
            command.press(NEXT)
        command.wait_for("Stop recording")
        judgements.append(self.cell.status()["judgement"])
        command.finish()
        return judgements

    def dagger(self, layout: Layout, policy: Path, root: Path, repo_id: str, autonomous: float = 1.0) -> dict:
        """The policy begins, then the person takes over with the leader and finishes the task.

        `--strategy.type=dagger` records this correction as an episode. Returns its judgement.
        """
        words = self.instruction(layout)
        self.cell.load(layout)
        command = self._rollout(policy, words, "--strategy.type=dagger", "--return_to_initial_position=false",
                                *self.cell.teleop, *self._dataset(root, repo_id, words, 1))  # fmt: skip
        command.wait_for("DAgger corrections-only recording started")
        while self.cell.status()["held"]:  # until its first action
            if not command.running:
                raise command.failure("ended before its first action")
            time.sleep(0.05)
        time.sleep(autonomous)
        command.press(PAUSE)
        command.wait_for("moving leader arm to follower position")
        command.press(CORRECT)
        command.wait_for("Entering correction mode")
        self.cell.demonstrate()
        self._wait_for_person(command)
        judgement = self.cell.status()["judgement"]
        command.press(CORRECT)
        command.wait_for("Correction 1/1 saved")
        self.cell.rest()
        command.finish()
        return judgement

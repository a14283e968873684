"""Virtual cell: two simulated SO-100 arms that LeRobot's commands use like real ones.

    python -m lerobot_env_virtual_so100.cell

Four processes share memory: the follower's bus, the leader's bus, the physics (in real time, with the person at the
leader), and the cameras. LeRobot sees only two serial ports and two network cameras. `Cell` sets up scenes, tells the
person what to do, and reports the simulator's ground truth.
"""

import contextlib
import json
import shlex
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import numpy as np

from . import calibration
from .bus import VirtualBus, at_once, processes
from .camera import View, lerobot_cameras
from .camera import serve as serve_cameras
from .constants import EPISODE_SECONDS, IMAGE_SIZE, SPLITS
from .faults import Faults
from .person import LOOKS_A_SECOND, Person
from .servo import Shafts
from .simulation import Simulation
from .tasks import Layout, make_task

IDS = {"follower": "virtual_follower", "leader": "virtual_leader"}
_TICKS_A_SECOND = 100  # of the loop; physics runs at 500 Hz
_LEADER_MOTOR_SPEED = 180.0  # degrees/s, when its motors move it
_LATE = 0.2  # s that the simulation may lag behind the clock before it skips this time
_PUBLISHED_WITHIN = 60.0  # s; the machine may be busy


class Physics:
    """Follower, leader, objects and person, advanced a hundredth of a second at a time."""

    def __init__(self, task: str, shafts: dict[str, Shafts], view: View, seed: int):
        self._task = make_task(task)
        self._sim = Simulation(self._task.spec, _TICKS_A_SECOND)
        self._person = Person(task, self._sim, seed)
        self._shafts, self.view = shafts, view
        self._strength = self._sim.model.actuator_forcerange.copy()  # this process's own model: it may change
        self._joints = [self._sim.data.joint(name) for name in calibration.calibration("follower")]
        self._leader = np.zeros(6)
        self._held: np.ndarray | None = None  # the follower is held here until it gets a command
        self._goals_seen = np.zeros(6)
        self._layout: Layout | None = None
        self._scene = self._ticks = 0
        self._judgement: dict = {}
        self.skipped = 0.0

    # Orders ---------------------------------------------------------------------------------------------------

    def load(self, layout: Layout, place: bool) -> int:
        """Set up a scene; with `place` also both arms, and hold the follower until it gets a command. Returns the
        number of the scene."""
        self._layout, self._judgement = layout, {}
        if place:
            self._sim.load(layout)
            self._held = self._leader = self._sim.arm.state
            self._goals_seen = self._shafts["follower"].goals.copy()
            self._person.rest()
        else:
            self._sim.arrange(layout)
        self._task.begin(self._sim)
        self._scene += 1
        self._write_encoders()
        self._show()
        return self._scene

    def demonstrate(self, colour: str | None) -> None:
        """Let the person do the task; by default with the scene's target."""
        self._person.demonstrate(colour or self._layout.target)

    def bring(self, layout: Layout | None) -> None:
        """Let the person bring the arm to the start of a scene; by default of the current one."""
        self._person.bring((layout or self._layout).start(self._sim.arm))

    def rest(self) -> None:
        """Let the person let go."""
        self._person.rest()

    def status(self) -> dict:
        """Ground truth: joints, cubes, whether the person is busy, and the judgement (`judge`)."""
        return {
            "seconds": self._ticks / _TICKS_A_SECOND,
            "skipped": self.skipped,
            "follower": self._sim.arm.state,
            "leader": self._leader.copy(),
            "cubes": {colour: self._sim.cube(colour) for colour in self._task.spec.cubes},
            "busy": self._person.busy,
            "held": self._held is not None,
            "judgement": dict(self._judgement),
        }

    # Time -----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One step of the loop."""
        if self._ticks % (_TICKS_A_SECOND // LOOKS_A_SECOND) == 0:
            self._person.look()
        self._move_leader()
        self._move_follower()
        self._write_encoders()
        self._ticks += 1
        self._show()

    def elapse(self, seconds: float) -> None:
        """Let this much time pass at once, rounded to steps of the loop."""
        for _ in range(round(seconds * _TICKS_A_SECOND)):
            self.tick()

    def _move_leader(self) -> None:
        """Move the leader by its motors or by the person's hand. It is light: without them it stays where it is."""
        shafts = self._shafts["leader"]
        if shafts.torque.any():
            goal = self._sim.arm.to_units(calibration.to_radians(shafts.target, "leader"))
            step = _LEADER_MOTOR_SPEED / _TICKS_A_SECOND * (shafts.torque > 0)
            self._leader = self._leader + np.clip(goal - self._leader, -step, step)
        else:
            self._leader = self._person.move(self._leader, 1 / _TICKS_A_SECOND)

    def _move_follower(self) -> None:
        """Advance the physics. Without torque, the friction of the gears lets the arm sink only slowly."""
        shafts, arm = self._shafts["follower"], self._sim.arm
        if self._held is not None and (shafts.goals > self._goals_seen).all():
            self._held = None
        self._sim.model.actuator_forcerange[:] = self._strength * shafts.torque[:, None]
        jammed = [(joint, joint.qpos[0]) for joint, jam in zip(self._joints, shafts.jammed, strict=True) if jam]
        self._sim.advance(arm.to_units(calibration.to_radians(shafts.target, "follower")))
        for joint, place in jammed:
            joint.qpos[0], joint.qvel[0] = place, 0.0
        if self._held is not None:
            arm.place(self._held)
        elif shafts.torque.any():
            self._judge()

    def _write_encoders(self) -> None:
        """Tell the servos where both arms are."""
        for role, posture in (("leader", self._leader), ("follower", self._sim.arm.state)):
            self._shafts[role].encoder[:] = calibration.to_encoder(self._sim.arm.to_radians(posture), role)

    def _judge(self) -> None:
        """Judge success as the task defines it. This is called only while the arm has torque, so the judgement of the
        moment when the command switched the torque off remains."""
        if self._layout is None:
            return
        self._task.observe(self._sim)
        target = self._layout.target
        before = self._task.ends_on_success and self._judgement.get("is_success", False)
        at = [colour for colour in self._task.spec.cubes if self._task.success(self._sim, colour)]
        self._judgement = {
            "task": self._task.name,
            "split": self._layout.split,
            "seed": self._layout.seed,
            "is_success": before or target in at,
            "instructed": target,
            "target": target,
            "ended_at": target if before else at[0] if at else "none",
            "distance": self._task.distance(self._sim, target),
        }

    def _show(self) -> None:
        self.view.write(self._scene, self._sim.data)


def _serve_physics(pipe, task: str, shafts: dict[str, Shafts], view: View, seed: int, stepped: bool) -> None:
    """Main function of the physics' process, until the pipe closes. Time is real, or passes only in `elapse`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    physics = Physics(task, shafts, view, seed)
    pipe.send(None)
    at_once(1)
    due = time.monotonic()
    with contextlib.suppress(EOFError, OSError):
        while True:
            late = 0.0
            if not stepped:
                physics.tick()
                due += 1 / _TICKS_A_SECOND
                late = time.monotonic() - due
            if late > _LATE:  # skip this time; do not run faster to catch up
                physics.skipped += late
                due += late
            if pipe.poll(None if stepped else max(0.0, -late)):
                order, arguments = pipe.recv()
                if order == "close":
                    return
                pipe.send(getattr(physics, order)(*arguments))


class Cell:
    """Two arms, two cameras, a table. Use it as a context manager."""

    def __init__(
        self, folder: Path, task: str = "reach", image_size: int = IMAGE_SIZE, camera_fps: int = 30,
        calibrated: bool = True, seed: int = 0, stepped: bool = False,
    ):  # fmt: skip
        """Start the processes.

        `folder` is for links to the ports, logs of the buses and calibration files. Without `calibrated` the servos
        have their factory settings, and `lerobot-calibrate` has to be run. In a `stepped` cell, time for servos,
        physics and person passes only in `elapse`; the cameras publish as usual.
        """
        self.folder, self.task = folder.absolute(), make_task(task)
        self._image_size, self._camera_fps = image_size, camera_fps
        context = processes()
        self.folder.mkdir(parents=True, exist_ok=True)
        calibration.write_files(self.folder / "calibration", IDS)
        self.buses = {
            role: VirtualBus(log=self.log(role), link=self.folder / role, stepped=stepped) for role in calibration.ROLES
        }  # the first one starts the fork server, from which the other processes come
        shafts = {role: bus.shafts for role, bus in self.buses.items()}
        for role, bus in self.buses.items():
            if calibrated:
                bus.calibrate(calibration.registers(role))
        self.view = View.allocate(context)
        self._physics = self._start(context, _serve_physics, task, shafts, self.view, seed, stepped)
        self._physics[1].recv()
        self._cameras = self._start(context, serve_cameras, self.view, self.task.spec, image_size, camera_fps)
        self._camera_port = self._cameras[1].recv()

    @staticmethod
    def _start(context, target, *arguments) -> tuple:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def log(self, role: str) -> Path:
        """The log of an arm's bus."""
        return self.folder / f"{role}.jsonl"

    def _order(self, order: str, *arguments):
        self._physics[1].send((order, arguments))
        return self._physics[1].recv()

    def load(self, layout: Layout, place: bool = True) -> None:
        """Set up a scene, and return when the cameras show it.

        With `place` both arms are put at its start, and the follower is held there until a goal reaches it.
        """
        scene, until = self._order("load", layout, place), time.monotonic() + _PUBLISHED_WITHIN
        while self.view.published < scene:
            if not self._cameras[0].is_alive() or time.monotonic() > until:
                raise RuntimeError("the cell's cameras show nothing: their process has died or the machine is too busy")
            time.sleep(0.01)

    def elapse(self, seconds: float) -> None:
        """Let time pass in a stepped cell."""
        for bus in self.buses.values():
            bus.elapse(seconds)
        self._order("elapse", seconds)

    def demonstrate(self, colour: str | None = None) -> None:
        """Let the person do the task by moving the leader; `status()["busy"]` says until when."""
        self._order("demonstrate", colour)

    def bring(self, layout: Layout | None = None) -> None:
        """Let the person bring the follower to the start of a scene, by default of the current one."""
        self._order("bring", layout)

    def rest(self) -> None:
        """Let the person let go of the leader."""
        self._order("rest")

    def status(self) -> dict:
        """Ground truth; see `Physics.status`."""
        return self._order("status")

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that LeRobot's commands need."""
        return {"HF_LEROBOT_CALIBRATION": str(self.folder / "calibration")}

    @property
    def blind(self) -> list[str]:
        """Options of the follower without its cameras: `--robot.…`."""
        return ["--robot.type=so100_follower", f"--robot.port={self.buses['follower'].port}",
                f"--robot.id={IDS['follower']}"]  # fmt: skip

    @property
    def robot(self) -> list[str]:
        """Options of the follower with its cameras."""
        cameras = json.dumps(lerobot_cameras(self._camera_port, self._image_size, self._camera_fps))
        return [*self.blind, f"--robot.cameras={cameras}"]

    @property
    def teleop(self) -> list[str]:
        """Options of the leader: `--teleop.…`."""
        return ["--teleop.type=so100_leader", f"--teleop.port={self.buses['leader'].port}",
                f"--teleop.id={IDS['leader']}"]  # fmt: skip

    def close(self) -> None:
        """End all processes."""
        for process, pipe in (self._cameras, self._physics):
            with contextlib.suppress(OSError):  # it may have died
                pipe.send(("close", ()))
            process.join(timeout=2)
            process.kill()
            pipe.close()
        for bus in self.buses.values():
            bus.close()

    def __enter__(self) -> "Cell":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass
class CellConfig:
    """Two virtual SO-100 arms with two cameras, for LeRobot's commands in another terminal."""

    # Folder for the ports, the calibration files and the logs of the buses.
    folder: Path = Path("outputs/cell")
    # What stands on the table: reach or pick_place.
    task: str = "reach"
    # Stream of scenes: train, validation or test.
    split: str = "train"
    # First scene.
    seed: int = 0
    # Height and width of the cameras' pictures in pixels.
    image_size: int = IMAGE_SIZE
    # Faults of the follower's bus: --faults.drop=0.1 and so on, see faults.py.
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self):
        if self.task not in EPISODE_SECONDS:
            raise ValueError(f"--task must be one of {', '.join(EPISODE_SECONDS)}, not {self.task!r}")
        if self.split not in SPLITS:
            raise ValueError(f"--split must be one of {', '.join(SPLITS)}, not {self.split!r}")


def serve(config: CellConfig) -> None:
    """Run a cell by hand until the input ends."""
    with Cell(config.folder, config.task, config.image_size) as cell:
        cell.buses["follower"].inject(config.faults)
        for name, value in cell.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        print(f"\nFOLLOWER: {shlex.join(cell.robot)}\n\nLEADER:   {shlex.join(cell.teleop)}\n")
        print("ENTER: next scene, d: let the person at the leader do the task, s: show the judgement, q: quit\n")
        seed = config.seed
        _next_scene(cell, config.split, seed)
        while (key := input().strip()) != "q":
            if key == "d":
                cell.demonstrate()
            elif key == "s":
                print(cell.status()["judgement"] or "the follower has not been commanded yet")
            else:
                seed += 1
                _next_scene(cell, config.split, seed)


def _next_scene(cell: Cell, split: str, seed: int) -> None:
    layout = cell.task.sample(split, seed)
    cell.load(layout)
    print(f"scene {seed}: {cell.task.instruction(layout.target, layout.phrase)}")


@draccus.wrap()
def main(config: CellConfig) -> None:
    """Command line."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        serve(config)


if __name__ == "__main__":
    main()

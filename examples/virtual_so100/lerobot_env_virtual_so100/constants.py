"""Constants shared by the environment's registration (whose import must be fast) and the simulation."""

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = ("front", "left")
FPS = 10
IMAGE_SIZE = 64
# Length of an episode in seconds of simulated time.
EPISODE_SECONDS = {"reach": 2.8, "hover": 2.8, "pick_place": 13.0}
ENV_TYPE = "virtual_so100"
SPLITS = ("train", "validation", "test")
INSTRUCTIONS = ("named", "swapped")


def episode_steps(task: str, fps: int) -> int:
    """Control steps of an episode, e.g. 28 for reach at 10 Hz."""
    if task not in EPISODE_SECONDS:
        raise ValueError(f"task must be one of {', '.join(EPISODE_SECONDS)}, not {task!r}")
    return round(EPISODE_SECONDS[task] * fps)

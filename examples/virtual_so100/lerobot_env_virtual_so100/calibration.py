"""Calibration of the two virtual arms: conversion between encoder ticks, joint angles and LeRobot's units.

LeRobot's zero degrees is the middle of a joint's calibrated range, and the model's zero is the straight arm. So that
the two agree, the ranges are symmetric around the middle of the turn, 2047.5 ticks. The gripper's 0 and 100 are the
ends of its range. LeRobot counts 4095 ticks per turn and the servo has 4096: a difference of 0.02 degrees at 90, less
than half a tick.
"""

import json
from pathlib import Path

import numpy as np

from .constants import JOINTS
from .servo import HOMING, HOMING_SIGN, MAX_LIMIT, MIN_LIMIT, TICKS, to_magnitude

ROLES = ("follower", "leader")
# Where LeRobot looks for the files: the drivers' names are so_follower and so_leader, not so100_*.
FOLDERS = {"follower": "robots/so_follower", "leader": "teleoperators/so_leader"}

# Radians, as of the model's actuators; but for LeRobot the wrist can make a whole turn.
_RANGES = {
    "shoulder_pan": (-1.91986, 1.91986),
    "shoulder_lift": (-1.74533, 1.74533),
    "elbow_flex": (-1.69, 1.69),
    "wrist_flex": (-1.65806, 1.65806),
    "wrist_roll": (-np.pi, np.pi),
    "gripper": (-0.17453, 1.74533),
}
# Homing offsets in ticks. They depend on how the horns were screwed on, so each arm has its own.
_HOMING = {"follower": (112, -734, 913, -41, 1290, -388), "leader": (-1530, 267, -95, 802, -610, 44)}
_MIDDLE = (TICKS - 1) / 2
_TICKS_PER_RADIAN = TICKS / (2 * np.pi)


def calibration(role: str) -> dict[str, dict]:
    """What `lerobot-calibrate` would write for the follower or the leader."""
    entries = {}
    for number, (name, homing) in enumerate(zip(JOINTS, _HOMING[role], strict=True), start=1):
        low, high = (_MIDDLE + bound * _TICKS_PER_RADIAN for bound in _RANGES[name])
        # The nearest ticks inside; the wrist's whole turn is 0 to 4095.
        bounds = (0, TICKS - 1) if name == "wrist_roll" else (int(np.ceil(low)), int(np.floor(high)))
        entries[name] = {
            "id": number,
            "drive_mode": 0,
            "homing_offset": homing,
            "range_min": bounds[0],
            "range_max": bounds[1],
        }
    return entries


def write_files(folder: Path, names: dict[str, str] | None = None) -> None:
    """Write both arms' files below `$HF_LEROBOT_CALIBRATION`; `names` are the arms' ids, by default their roles."""
    for role in ROLES:
        path = folder / FOLDERS[role] / f"{(names or {}).get(role, role)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(calibration(role), indent=4) + "\n")


def registers(role: str) -> dict[int, dict[int, bytes]]:
    """{id: {address: bytes}} of a calibrated arm's servos."""
    return {
        entry["id"]: {
            HOMING: to_magnitude(entry["homing_offset"], HOMING_SIGN).to_bytes(2, "little"),
            MIN_LIMIT: entry["range_min"].to_bytes(2, "little"),
            MAX_LIMIT: entry["range_max"].to_bytes(2, "little"),
        }
        for entry in calibration(role).values()
    }


def to_encoder(radians: np.ndarray, role: str) -> np.ndarray:
    """Joint angles (6,) of the model -> ticks (6,) of the encoders."""
    return _MIDDLE + np.array(_HOMING[role]) + np.asarray(radians) * _TICKS_PER_RADIAN


def to_radians(encoder: np.ndarray, role: str) -> np.ndarray:
    """Inverse of `to_encoder`."""
    return (np.asarray(encoder) - _MIDDLE - np.array(_HOMING[role])) / _TICKS_PER_RADIAN

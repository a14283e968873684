"""Constants of the environment and its data. Importing this needs no MetaWorld."""

STATE = ("hand_x", "hand_y", "hand_z", "gripper")
ACTION = ("move_x", "move_y", "move_z", "grip")
FULL_STATE = 39  # numbers of MetaWorld's own observation
FPS = 80

"""MetaWorld with small pictures that a CPU draws quickly, for LeRobot: `--env.type=metaworld_small`.

LeRobot imports this module at the start of every command, so it only registers a name; MetaWorld is imported when an
environment is made.
"""

from .configuration_metaworld_small import MetaworldSmallEnv

__all__ = ["MetaworldSmallEnv"]

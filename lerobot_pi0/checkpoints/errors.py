"""Errors of checkpoints: one base class, and a kind for each remedy."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what was found and what to do."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such folder, repository or file, or no way to it."""


class CorruptCheckpointError(CheckpointError):
    """A file that is cut, unreadable, changed since it was written, or holds numbers that are not finite."""


class UnsafeCheckpointError(CheckpointError):
    """A file that would run a program, load code or read what is not the checkpoint's."""


class WrongPolicyError(CheckpointError):
    """A checkpoint of something else: another policy, π₀.₅, π₀-FAST, an adapter, a LeRobot before 0.4."""


class CheckpointConfigError(CheckpointError):
    """Options that do not describe a π₀, or that this checkpoint cannot keep."""


class MismatchedCheckpointError(CheckpointError):
    """Tensors that are missing, unexpected, or of another shape or kind than the network's."""

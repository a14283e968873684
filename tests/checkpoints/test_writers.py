"""Several processes at one folder, full disks and interrupted saves: the old checkpoint, the new one, or an error."""

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import micro_policy
from test_checkpoint import identity, in_a_child, leave_unfinished, versions

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints import checkpoint, writing
from lerobot_pi0.checkpoints.errors import CheckpointError, CorruptCheckpointError
from lerobot_pi0.checkpoints.writing import FolderInUseError

pytestmark = pytest.mark.usefixtures("micro")

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    versions()[0].save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def holding(folder: Path) -> int:
    """A process that holds the lock of a folder until it is killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with writing.locked(folder):
            os.write(told, b"x")
            time.sleep(600)
        os._exit(1)
    os.read(ready, 1)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_second_of_two_writers_is_refused(folder):
    """Catches two processes that save into one folder, and leave one's weights with the other's options."""
    before, child = files_of(folder), holding(folder)
    try:
        with pytest.raises(FolderInUseError, match=f"another process is saving into {folder}.*a folder of your own"):
            versions()[1].save_pretrained(folder)
        assert files_of(folder) == before
        PI0Policy.from_pretrained(folder)  # a reader of a whole checkpoint need not wait
    finally:
        kill(child)


def test_a_dead_process_keeps_no_lock(folder):
    """Catches a folder that nobody can save into any more, as whoever locked it was killed."""
    kill(holding(folder))
    new = versions()[1]
    new.save_pretrained(folder)
    assert identity(PI0Policy.from_pretrained(folder)) == identity(new)


def test_two_threads_are_two_writers(folder):
    """Catches a lock that knows processes alone: a thread that uploads, and one that trains on."""
    with writing.locked(folder), pytest.raises(FolderInUseError):
        versions()[1].save_pretrained(folder)


@pytest.mark.parametrize("moment", ["the processors", "the weights' header", "the names", "the weights"])
def test_a_reader_beside_a_writer(folder, moment, monkeypatch):
    """Catches options of one save with the weights of the next: the other process saves while this one reads."""
    new = versions()[1]
    owner, name = {
        "the processors": (checkpoint.Checkpoint, "of_run"),
        "the weights' header": (checkpoint.Checkpoint, "check"),
        "the names": (checkpoint, "check_tensors"),
        "the weights": (checkpoint, "fill"),
    }[moment]
    original = getattr(owner, name)

    def late(*args, **kwargs):
        assert in_a_child(lambda: new.save_pretrained(folder)) == 0
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, late)
    with pytest.raises(CorruptCheckpointError):
        PI0Policy.from_pretrained(folder)


@pytest.mark.parametrize("limit", [0, 100, 3000, -1])
def test_a_full_disk(folder, limit):
    """Catches a half-written file that stays, or replaces what was there, when there is no room for the new one."""
    before, size = files_of(folder), (folder / WEIGHTS).stat().st_size
    most = limit if limit >= 0 else size - 1

    def save() -> None:
        policy = versions()[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        try:
            policy.save_pretrained(folder)
        except OSError:
            os._exit(7)

    assert in_a_child(save) == 7
    assert files_of(folder) == before
    assert identity(PI0Policy.from_pretrained(folder)) == identity(versions()[0])


def test_a_read_only_folder_with_an_unfinished_save():
    """Catches a checkpoint on a disk that cannot be written, whose save nobody can finish, as a mixture or an error."""
    with tempfile.TemporaryDirectory() as root:  # pytest's own folder is not for other users
        folder = Path(root) / "saved"
        leave_unfinished(folder)
        new = identity(versions()[1])
        before = {*files_of(folder)}
        Path(root).chmod(0o755)
        folder.chmod(0o555)

        def load() -> None:
            if os.getuid() == 0:  # who may write anything
                os.setuid(65534)
            assert identity(PI0Policy.from_pretrained(folder)) == new

        shutil.copytree(folder, Path(root) / "twin")
        PI0Policy.from_pretrained(Path(root) / "twin")  # what is imported late is here before the user changes
        assert in_a_child(load) == 0
        assert {*files_of(folder)} == before
        folder.chmod(0o755)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "lerobot_pi0.json", "lerobot_pi0_manifest.json"])
@pytest.mark.parametrize("length", [0, 7, 100])
def test_a_torn_new_file(folder, name, length):
    """Catches what a power cut left half-written that blocks the whole checkpoint beside it, or takes its place."""
    old, new = versions()[:2]
    (folder / f"{name}.new").write_bytes((folder / name).read_bytes()[:length])
    (folder / f"{name}.new.part").write_bytes(b"x")
    assert identity(PI0Policy.from_pretrained(folder)) == identity(old)
    new.save_pretrained(folder)
    assert identity(PI0Policy.from_pretrained(folder)) == identity(new)
    assert not [file for file in folder.iterdir() if ".new" in file.name]


def test_a_new_file_of_another_save(folder, tmp_path):
    """Catches whole weights of a save that was never committed, which are taken for those of the checkpoint."""
    versions()[2].save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / f"{WEIGHTS}.new")
    assert identity(PI0Policy.from_pretrained(folder)) == identity(versions()[0])


def test_a_folder_that_was_deleted_between_two_saves(tmp_path):
    """Catches a run that ends because somebody made room on the disk, and deleted the checkpoint before the last."""
    policy = micro_policy()
    policy.save_pretrained(tmp_path / "1")
    shutil.rmtree(tmp_path / "1")
    policy.save_pretrained(tmp_path / "2")
    PI0Policy.from_pretrained(tmp_path / "2")


def for_ever(work) -> int:
    """A process that does the same thing until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    return child


@pytest.mark.slow
def test_kill_beside_a_reader_and_a_second_writer(tmp_path):
    """Catches what no list of moments foresees: two writers and a reader at one folder, and SIGKILL."""
    policies, draw = versions(), random.Random(0)
    expected = [identity(policy) for policy in policies]
    folder, log = tmp_path / "saved", tmp_path / "read"
    policies[0].save_pretrained(folder)

    def save(mine: list[PI0Policy]) -> None:
        for policy in mine:
            try:
                policy.save_pretrained(folder)
            except FolderInUseError:
                time.sleep(draw.uniform(0, 0.002))

    def read() -> None:
        try:
            outcome = str(expected.index(identity(PI0Policy.from_pretrained(folder))))
        except CheckpointError as error:
            outcome = f"refused {type(error).__name__}"
        except BaseException as error:
            outcome = f"WRONG {type(error).__name__}: {error}"
        with log.open("a") as opened:
            opened.write(outcome + "\n")

    found = []
    for _ in range(60):
        children = [for_ever(lambda: save(policies[:2])), for_ever(lambda: save(policies[2:])), for_ever(read)]
        time.sleep(draw.uniform(0.1, 1.5))
        for child in children[:2] if draw.random() < 0.5 else children[1::-1]:
            kill(child)
            time.sleep(draw.uniform(0, 0.02))
        kill(children[2])
        found.append(expected.index(identity(PI0Policy.from_pretrained(folder))))  # raises for a mixture
    counted = Counter(log.read_text().splitlines())
    print(Counter(found), counted)
    assert len(set(found)) > 1
    assert {*counted} >= {"0", "1"}
    assert not [outcome for outcome in counted if outcome.startswith("WRONG")], counted

"""What is shown of a command that runs for long."""

import json
import sys

import pytest
from lerobot_env_virtual_so100 import running

BAR = "import sys\nfor i in range(300): sys.stderr.write(f'\\rsteps: {i} [9.99it/s]')"


def command(folder, end: str) -> list[str]:
    """A command with a progress bar, and this line of Python at its end."""
    (folder / "program.py").write_text(f"{BAR}\n{end}\n")
    return [sys.executable, str(folder / "program.py")]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_moves_on_a_terminal_only(tmp_path, capsys, monkeypatch, terminal):
    """Catches megabytes of progress bars where the output goes to a file, and a terminal on which nothing moves."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(running, "BETWEEN_LINES", 1e9)
    running.run("a title", command(tmp_path, "print('\\nINFO [now] step:300 loss:0.1')"), tmp_path / "log.txt")
    shown = capsys.readouterr().out
    assert "a title" in shown and "done in" in shown
    assert ("\r" in shown) == terminal == ("step:300 loss:0.1" in shown)
    assert (tmp_path / "log.txt").read_text().count("it/s") == 300


def test_a_file_has_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    """Catches an hour without a sign of life, and a failure that does not say where its output is."""
    monkeypatch.setattr(running, "BETWEEN_LINES", -1.0)
    with pytest.raises(SystemExit, match=r"(?s)status 3; its output is in .*log.txt:\n.*299"):
        running.run("a title", command(tmp_path, "sys.exit(3)"), tmp_path / "log.txt")
    shown = capsys.readouterr().out
    assert "\n   steps: 299 [9.99it/s]\n" in shown and "\r" not in shown


def test_only_an_earlier_run_is_removed(tmp_path):
    """Catches a command that empties a folder of somebody else's: LeRobot trains into outputs/train."""
    mine, theirs = tmp_path / "mine", tmp_path / "train"
    running.remove_run(mine, "local/arm")
    for folder, repo_id in ((mine, "local/arm"), (theirs, "you/cubes")):
        saved = folder / "checkpoints" / "last" / "pretrained_model"
        saved.mkdir(parents=True)
        (saved / "train_config.json").write_text(json.dumps({"dataset": {"repo_id": repo_id}}))
    running.remove_run(mine, "local/arm")
    assert not mine.exists()
    for other in (theirs, tmp_path):
        with pytest.raises(SystemExit, match=r"holds other things than an earlier run.*another --output"):
            running.remove_run(other, "local/arm")
    assert saved.is_dir()

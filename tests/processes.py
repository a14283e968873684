"""Separate Python processes, for things that can happen only once in a process, such as imports."""

import json
import os
import subprocess
import sys
from pathlib import Path


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start a Python process that prints its answer as JSON in its last line."""
    program = f"import json\nanswers = {{}}\n{code}\nprint(json.dumps(answers))"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parent,  # not the root: the package has to be found because it is installed
    )


def finish(process: subprocess.Popen) -> tuple[dict, str]:
    """The answer and the log of such a process."""
    out, log = process.communicate(timeout=550)
    assert process.returncode == 0, log[-4000:]
    return json.loads(out.splitlines()[-1]), log

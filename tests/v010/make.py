"""Make `data/` again: checkpoints, half-done runs and reference values, with the code of version 0.1.0.

    git worktree add ../v010 v0.1.0
    python tests/v010/make.py ../v010

Everything below `data/` is replaced. The numbers hold to the tolerances of `test_v010.py` on any CPU with VNNI, which
int8 needs; the files' bits depend on the machine.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main(checkout: Path) -> None:
    """Import 0.1.0 from `checkout` and write `data/`."""
    sys.path.insert(0, str(checkout))
    import lerobot_pi0
    import lerobot_policy_pi0  # noqa: F401

    if lerobot_pi0.__version__ != "0.1.0" or checkout not in Path(lerobot_pi0.__file__).parents:
        sys.exit(f"{lerobot_pi0.__file__} is version {lerobot_pi0.__version__}: give a checkout of the tag v0.1.0")
    import recording as r

    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve()
        r.write_dataset(root / "dataset")
        for run in ("frozen", "8bit"):
            with r.size_of(run):
                r.write_base(root / r.base_of(run), root / "dataset")
        expected = {}
        for run in r.RUNS:
            with r.size_of(run):
                losses = r.begin(run, root)
                actions = r.act(r.checkpoint(run, root) / "pretrained_model")
            expected[run] = {
                "losses": [loss.hex() for loss in losses],
                "chunk": [x.hex() for x in actions.double().flatten().tolist()],
            }
        keep(root)
        r.write_json(r.DATA / "runs.json", expected)
        values = {}
        with r.small():
            for dtype in ("float32", "bfloat16"):
                for name, setting in r.SETTINGS.items():
                    found = r.numbers(setting("lerobot_pi0", dtype, root / "small"))
                    values[f"{dtype}, {name}"] = {k: " ".join(v.hex() for v in x) for k, x in found.items()}
        r.write_json(r.DATA / "network.json", values)
    print(f"{sum(f.stat().st_size for f in r.DATA.rglob('*') if f.is_file()) / 2**20:.2f} MiB in {r.DATA}")


def keep(root: Path) -> None:
    """Move what is to be kept into `data/`: the checkpoints that runs begin with, and those half way."""
    import recording as r

    shutil.rmtree(r.DATA, ignore_errors=True)
    for base in sorted({r.base_of(run) for run in r.RUNS}):
        shutil.copytree(root / base, r.DATA / base)
    for run in r.RUNS:
        shutil.copytree(r.checkpoint(run, root), r.checkpoint(run, r.DATA))
    for card in r.DATA.rglob("README.md"):
        card.unlink()
    r.move(r.DATA, str(root), r.ROOT)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())

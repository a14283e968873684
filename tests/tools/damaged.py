"""Damage to a dataset, drawn from a seed: to `meta/`, to columns of its data, and to its videos."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 12345\n".format("0" * 64)
ODD = (None, -1, 0, 1e30, float("nan"), "", "x", [], {}, [[]], True, [1, "a"], "9" * 40)


def damage(root: Path, seed: int) -> str:
    """Damage a dataset in one to three ways. Returns what was done."""
    draw = random.Random(seed)
    return "; ".join(draw.choice(KINDS)(root, draw) for _ in range(draw.choice((1, 1, 2, 3))))


def _any_file(root: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(file for file in root.rglob("*") if file.is_file()) or [root / "meta/info.json"])


def remove(root: Path, draw: random.Random) -> str:
    file = _any_file(root, draw)
    file.unlink(missing_ok=True)
    return f"removed {file.name}"


def remove_folder(root: Path, draw: random.Random) -> str:
    folder = draw.choice(sorted(x for x in root.rglob("*") if x.is_dir()) or [root])
    shutil.rmtree(folder, ignore_errors=True)
    return f"removed {folder.relative_to(root)}"


def pointer(root: Path, draw: random.Random) -> str:
    file = _any_file(root, draw)
    file.write_text(POINTER)
    return f"pointer {file.name}"


def truncate(root: Path, draw: random.Random) -> str:
    file = _any_file(root, draw)
    data = file.read_bytes() if file.exists() else b""
    file.write_bytes(data[: int(len(data) * draw.random())])
    return f"truncated {file.name}"


def flip(root: Path, draw: random.Random) -> str:
    file = _any_file(root, draw)
    data = bytearray(file.read_bytes() if file.exists() else b"")
    for _ in range(draw.choice((1, 10, 100))):
        if data:
            data[draw.randrange(len(data))] = draw.randrange(256)
    file.write_bytes(bytes(data))
    return f"flipped {file.name}"


def _places(value, path=()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, x in items for place in _places(x, (*path, key))]


def odd_json(root: Path, draw: random.Random) -> str:
    """One value of info.json or stats.json becomes another type, or goes."""
    files = [root / "meta" / name for name in ("info.json", "info.json", "stats.json")]
    file = draw.choice(files)
    try:
        content = json.loads(file.read_text())
        place = draw.choice(_places(content))
    except (OSError, ValueError, IndexError):
        return "nothing"
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    if draw.random() < 0.3 and isinstance(inside, dict):
        del inside[place[-1]]
        value = "gone"
    else:
        inside[place[-1]] = value = draw.choice(ODD)
    file.write_text(json.dumps(content))
    return f"{file.name} {'/'.join(map(str, place))} = {value!r}"


def odd_column(root: Path, draw: random.Random) -> str:
    """A column of some parquet file goes, or some of its cells become NaN, large, negative, or of another length."""
    files = sorted(root.rglob("*.parquet"))
    if not files:
        return "nothing"
    file = draw.choice(files)
    try:
        table = pd.read_parquet(file)
        name = draw.choice(list(table.columns))
    except (OSError, ValueError, IndexError):
        return "nothing"
    how = draw.choice(("gone", "nan", "huge", "negative", "shorter", "text", "shuffled", "doubled"))
    rows = [draw.randrange(len(table)) for _ in range(3)] if len(table) else []
    column = table[name].tolist()
    changes: dict[str, Callable] = {
        "nan": lambda x: np.full_like(np.asarray(x, float), np.nan) if np.ndim(x) else None,
        "huge": lambda x: np.asarray(x, float) * 1e30 if np.ndim(x) else 10**12,
        "negative": lambda x: -np.asarray(x, float) - 1 if np.ndim(x) else -5,
        "shorter": lambda x: x[:-1] if np.ndim(x) else None,
        "text": lambda x: "text",
    }
    try:
        if how == "gone":
            table = table.drop(columns=name)
        elif how == "shuffled":
            table = table.iloc[draw.sample(range(len(table)), len(table))]
        elif how == "doubled":
            table = pd.concat([table, table.iloc[: len(table) // 2]])
        else:
            for row in range(len(column)) if how == "text" else rows:
                column[row] = changes[how](column[row])
            table[name] = pd.Series(column, index=table.index)
        table.to_parquet(file, index=file.name == "tasks.parquet")
    except (TypeError, ValueError, ArithmeticError):  # a cell that parquet, or the change itself, has no form for
        return "nothing"
    return f"{file.relative_to(root)}: {name} {how}"


def exchange(root: Path, draw: random.Random) -> str:
    """Two files change places."""
    one, other = _any_file(root, draw), _any_file(root, draw)
    if one.exists() and other.exists() and one != other:
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)
    return f"exchanged {one.name} and {other.name}"


KINDS = (remove, remove_folder, pointer, truncate, flip, odd_json, odd_json, odd_json, odd_column, odd_column, exchange)

"""The promise "the same policy under the same name": LeRobot's commands on every start and every set of cameras."""

import drop_in
import pytest
from drop_in import COLUMNS, ROWS, cell_text, key_of, meant


def cells_of_page() -> dict[str, str]:
    """The cells of the page's table, by command, start and column."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in drop_in.made_table(drop_in.PAGE.read_text()).splitlines()
    ]
    return {
        key_of(row[0], row[1], column): cell for row in rows for column, cell in zip(head[2:], row[2:], strict=True)
    }


def test_the_page_has_all_cells():
    """Catches a table on the page with other commands, starts or cameras than the test's, or with a wrong cell."""
    wanted = {
        key_of(command, start, column): cell_text(meant(command, start, cameras))
        for command, start in ROWS
        for column, cameras in COLUMNS.items()
    }
    assert {key: cell.partition(" (")[0] for key, cell in cells_of_page().items()} == wanted


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command(tmp_path):
    """Catches a start or a set of cameras that is refused although LeRobot's own π₀ accepts it, or accepted with a
    camera in a wrong slot."""
    ours, theirs = drop_in.answers(tmp_path)
    wrong = {}
    for command, start in ROWS:
        for column, cameras in COLUMNS.items():
            key = key_of(command, start, column)
            if ours[key].get("slots") != meant(command, start, cameras):
                wrong[key] = ours[key]
            elif "slots" in theirs.get(key, {}) and "random" not in theirs[key]:
                assert "slots" in ours[key], f"{key}: LeRobot's own takes it"
    assert not wrong
    assert drop_in.table(ours, theirs) == drop_in.made_table(drop_in.PAGE.read_text()), (
        "python tests/drop_in.py FOLDER write"
    )

"""The report of `lerobot-pi0 check`, as text and as the sections of a page."""

import io
from collections.abc import Iterator

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from PIL import Image

from ..data import dim_names
from ..folder import short
from ..reports.markup import Html, Page, note, picture, section, strip, table, tag
from .subject import ERROR, FINE, WARNING, Finding, Subject

TITLES = {ERROR: "Errors", WARNING: "Warnings", FINE: "Fine"}
SIDE = 480
"""Most pixels of the longer side of a picture in the page."""


def counts(findings: list[Finding]) -> dict[str, int]:
    """How many findings there are of each grade."""
    return {grade: sum(finding.grade == grade for finding in findings) for grade in TITLES}


def summary(findings: list[Finding]) -> str:
    return ", ".join(f"{count} {grade}" for grade, count in counts(findings).items())


def as_text(findings: list[Finding]) -> str:
    """What is printed: errors first."""
    lines = []
    for grade in TITLES:
        for finding in findings:
            if finding.grade == grade:
                lines.append(f"{grade:8} {finding.about:12} {finding.message}")
                lines += [f"{'':21} → {finding.remedy}"] if finding.remedy else []
    return "\n".join([*lines, "", summary(findings)])


def page(subject: Subject, findings: list[Finding], name: str) -> Page:
    """The page: what to look after, what there is to see of the dataset, and what is fine."""
    episodes, source = np.unique(subject.columns.episode), subject.trained.source
    facts = f"{len(episodes)} episodes, {len(subject.columns.episode)} frames at {subject.dataset.meta.fps} fps, "
    facts += f"beside {source}." if source else "for a policy from scratch."
    sections = [
        tag("p", tag("b", summary(findings))),
        *_graded(findings, ERROR, WARNING),
        section("Cameras", CAMERAS, *(_camera(subject, key) for key in subject.dataset.cameras)),
        section("Joints", JOINTS, *(_joints(subject, key) for key in (OBS_STATE, ACTION))),
        *_graded(findings, FINE),
    ]
    return Page(f"check: {name}", facts, sections)


CAMERAS = "One episode's middle frame each. From these pictures alone, would you know how to move the arm?"
JOINTS = "What was recorded, in the dataset's own unit. Half of the values lie between the quarters."


def _graded(findings: list[Finding], *grades: str) -> Iterator[Html]:
    for grade in grades:
        notes = [note(grade, x.message, x.about, x.remedy) for x in findings if x.grade == grade]
        if notes:
            yield section(TITLES[grade], "", *notes)


def _camera(subject: Subject, key: str) -> Html:
    return tag("div", tag("h3", key), strip(*_pictures(subject, key)))


def _pictures(subject: Subject, key: str) -> Iterator[Html]:
    columns = subject.columns
    numbers = np.unique(columns.episode)
    for number in numbers[np.unique([0, len(numbers) // 2, len(numbers) - 1])] if len(numbers) else ():
        rows = np.flatnonzero(columns.episode == number)
        row = rows[len(rows) // 2 :][:1]
        where = f"episode {number}, frame {columns.frame[row[0]]}"
        try:
            yield picture(_jpeg(next(subject.dataset.pictures(key, row))), where, "jpeg")
        except Exception as error:  # pictures of a damaged dataset may be anything
            yield note(ERROR, f"{where}: {short(error)}")


def _jpeg(image_CHW: torch.Tensor) -> bytes:
    """A picture in [0, 1], made small; what lies outside is cut off, as a finding tells."""
    whole = (image_CHW[:3].nan_to_num().clamp(0, 1) * 255).byte().permute(1, 2, 0).expand(-1, -1, 3)
    image, buffer = Image.fromarray(whole.numpy()), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def _joints(subject: Subject, key: str) -> Html:
    values_ND = subject.columns.state_ND if key == OBS_STATE else subject.columns.action_ND
    quarters_QD = np.quantile(values_ND, (0, 0.25, 0.5, 0.75, 1), axis=0) if len(values_ND) else np.empty((5, 0))
    named = zip(dim_names(subject.dataset, key), quarters_QD.T, strict=False)
    rows = [[name, *(f"{x:.3g}" for x in quarters)] for name, quarters in named]
    return tag("div", tag("h3", key), table([["joint", "least", "quarter", "median", "quarter", "most"], *rows]))

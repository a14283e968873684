"""Recorder of pipelines: LeRobot's way to save one, which then notes in the checkpoint's manifest what was written.

LeRobot tells a processor step neither where its pipeline is saved nor when the files are there. `take_over` calls this,
so that nothing heavy may be imported here.
"""

import functools
from pathlib import Path
from typing import Any

from lerobot.processor import DataProcessorPipeline, NormalizerProcessorStep


def record_saved_pipelines() -> None:
    """From now on, pipelines that are saved beside a policy of this plugin are recorded; others are not touched.

    Calling it again changes nothing.
    """
    original = DataProcessorPipeline._save_pretrained
    if hasattr(original, "records"):
        return

    @functools.wraps(original)
    def save_and_record(self: Any, save_directory: Path, **kwargs: Any) -> None:
        file = kwargs.get("config_filename") or f"{self._get_sanitized_name()}.json"
        original(self, save_directory, **kwargs)
        if file in ("policy_preprocessor.json", "policy_postprocessor.json"):
            from ..inputs.normalisation import digest_of
            from .manifest import record_pipeline

            statistics = [digest_of(step.stats) for step in self.steps if isinstance(step, NormalizerProcessorStep)]
            record_pipeline(Path(save_directory), file, next(iter(statistics), None))

    save_and_record.records = True  # type: ignore[attr-defined]
    DataProcessorPipeline._save_pretrained = save_and_record  # type: ignore[method-assign]

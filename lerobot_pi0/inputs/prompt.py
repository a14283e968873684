"""The prompt as openpi cleans it: "pick_up\\nthe cube " becomes "pick up the cube" (`PaligemmaTokenizer.tokenize`)."""

from typing import Any, ClassVar

import torch
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import ProcessorStepRegistry
from torch import Tensor

CLEANED = "cleaned"
"""Name of the one tensor in the state of a step that cleans; LeRobot's own step ignores it."""


def clean(prompt: str) -> str:
    """Without space around it, and with spaces for underscores and line breaks."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


class PromptStep(Pi0NewLineProcessor):
    """LeRobot's step, under LeRobot's name, that ends a prompt with a line break; where asked to, it cleans it first.

    A saved pipeline is rebuilt from names and states, so whether to clean is state. A run that starts from a checkpoint
    gets the checkpoint's pipeline, and LeRobot shows it nothing of the config: what a policy that is built for
    training asks for is left in `asked`, for the step that is built next.
    """

    asked: ClassVar[bool | None] = None

    def __init__(self, cleans: bool | None = None) -> None:
        self._decided = PromptStep.asked if cleans is None else cleans
        PromptStep.asked = None
        self.cleans = bool(self._decided)

    def complementary_data(self, complementary_data: dict[str, Any]) -> dict[str, Any]:
        task = complementary_data.get("task")
        if self.cleans and isinstance(task, str | list):
            cleaned = clean(task) if isinstance(task, str) else [clean(t) if isinstance(t, str) else t for t in task]
            complementary_data = {**complementary_data, "task": cleaned}
        return super().complementary_data(complementary_data)

    def state_dict(self) -> dict[str, Tensor]:
        return {CLEANED: torch.ones(1, dtype=torch.uint8)} if self.cleans else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._decided is None:
            self.cleans = CLEANED in state


def register_prompt_step() -> None:
    """Rebuild saved `pi0_new_line_processor` steps as the step that can do more."""
    ProcessorStepRegistry.unregister("pi0_new_line_processor")
    ProcessorStepRegistry.register("pi0_new_line_processor")(PromptStep)

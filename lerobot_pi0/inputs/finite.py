"""LeRobot's absolute actions with a check for NaN: the last step of π₀'s postprocessor that computes."""

from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import AbsoluteActionsProcessorStep
from torch import Tensor

from .normalisation import name_of_bad


class FiniteAbsoluteStep(AbsoluteActionsProcessorStep):
    """LeRobot's step, under LeRobot's name, which also looks whether actions are finite, be they relative or not.

    After it an action only changes its device. What is not finite here came from statistics, or from a state that was
    measured after the chunk was made: the policy has looked at its own numbers.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """The step.

        Raises:
            FloatingPointError: an action is NaN or infinite; names the joint.
        """
        transition = super().__call__(transition)
        action = transition.get(TransitionKey.ACTION)
        if isinstance(action, Tensor) and action.is_floating_point():
            names = getattr(self.relative_step, "action_names", None) or []
            if bad := name_of_bad(action, [str(name) for name in names]):
                raise FloatingPointError(
                    f"the action that would be sent for {bad}: nothing is sent. Check the statistics of the "
                    "checkpoint's postprocessor, and the robot's readings"
                )
        return transition

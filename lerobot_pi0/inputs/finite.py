"""Check for NaN in absolute actions: LeRobot's processor step with this check, the last computation before a robot."""

from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import AbsoluteActionsProcessorStep
from torch import Tensor

from .normalisation import name_of_bad


class FiniteAbsoluteStep(AbsoluteActionsProcessorStep):
    """LeRobot's step, under LeRobot's name, which also checks that actions are finite, whether relative or not.

    After this step an action is only moved to another device. The policy has already checked its own output, so a
    number that is not finite here comes from statistics, or from a state that was measured after the chunk was made.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Do LeRobot's step, then check the action.

        Raises:
            FloatingPointError: an action is NaN or infinite; the message names the joint.
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

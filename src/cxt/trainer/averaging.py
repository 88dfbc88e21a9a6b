"""An exponential moving average of the weights, which is validated and published instead of those of the last step."""

import contextlib
from collections.abc import Iterator

import torch
from pytorch_lightning.callbacks import Callback

from cxt.config.training import averaging_decay
from cxt.model.transformer import CoalescenceModel

STEP_WEIGHTS = "current_model_state"
"""Entry of a training state for the weights that training continues from; Lightning's name for it."""


class WeightAverage(Callback):
    """Averages the trained weights after each optimizer step: average ← d · average + (1 − d) · weights.

    In a training state the average is what readers find as weights; those of the last step are beside it. Lightning's
    `EMAWeightAveraging` stores the same, but it ends its exchange of weights before the hook in which we decode and keep the
    best, has no warm-up, and averages in the precision of the weights: in bfloat16, most steps would change nothing.

    Parameters
    ----------
    model : CoalescenceModel
        At its start; frozen parameters are not averaged.
    decay : float
        Largest d, see `averaging_decay`.
    """

    def __init__(self, model: CoalescenceModel, decay: float):
        self.model, self.decay, self._step = model, decay, 0
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer, module) -> None:
        """Move the average to the device, and note the step that the run starts from."""
        self._step = trainer.global_step
        self.average = {name: value.to(module.device) for name, value in self.average.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Update the average after an optimizer step."""
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        weights = [p.detach().float() for p in self._parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - averaging_decay(self._step, self.decay))

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        """Store the average as the weights of a training state, and those of the last step beside it."""
        checkpoint[STEP_WEIGHTS] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint["state_dict"] | {f"model.{name}": v for name, v in self.average.items()}

    def on_load_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        """Restore what `on_save_checkpoint` has stored, after Lightning has loaded the average as weights."""
        self.average = {name: checkpoint["state_dict"][f"model.{name}"].float() for name in self.average}
        module.load_state_dict(checkpoint[STEP_WEIGHTS])

    def _parameters(self) -> list[torch.nn.Parameter]:
        parameters = dict(self.model.named_parameters())
        return [parameters[name] for name in self.average]

    @torch.no_grad()
    def load_average(self) -> None:
        """Replace the model's weights by the average, in their own precision."""
        for parameter, value in zip(self._parameters(), self.average.values(), strict=True):
            parameter.copy_(value)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the model's weights by the average within a `with` block."""
        before = [p.detach().clone() for p in self._parameters()]
        self.load_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters(), before, strict=True):
                    parameter.copy_(value)

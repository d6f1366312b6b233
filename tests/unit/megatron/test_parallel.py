"""The groups of one process, and layouts that it cannot hold."""

import pytest

from nemo_opdlm.megatron.parallel import initialize


def test_one_process_is_first_and_last_stage_of_a_layout_that_is_built_once() -> None:
    context = initialize()
    assert (context.tp_size, context.pp_size, context.cp_size, context.dp_size) == (1, 1, 1, 1)
    assert context.is_first_stage and context.is_last_stage
    assert initialize().groups.tp is context.groups.tp


@pytest.mark.parametrize(
    "layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 3}]
)
def test_a_layout_that_the_processes_cannot_hold_is_refused_by_name(layout: dict[str, int]) -> None:
    initialize()
    ((name, size),) = layout.items()
    with pytest.raises(ValueError, match=rf"1 processes cannot hold .*{name}={size}.*: start a multiple of {size}\."):
        initialize(**layout)

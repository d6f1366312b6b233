"""Teacher logits at i - 1 are the target of position i, whatever the packing."""

import pytest
import torch

from nemo_opdlm.distillation.targets import TargetIndex

PROMPT_LEN, RESPONSE_LEN = [5, 1, 8], [3, 6, 1]


def index_of(rollouts: list[int]) -> TargetIndex:
    return TargetIndex(
        torch.tensor([PROMPT_LEN[b] for b in rollouts]), torch.tensor([RESPONSE_LEN[b] for b in rollouts])
    )


def oracle_rows() -> dict[tuple[int, int], int]:
    """(rollout, absolute position) -> packed row, counted one by one."""
    rows: dict[tuple[int, int], int] = {}
    for b, (prompt, response) in enumerate(zip(PROMPT_LEN, RESPONSE_LEN, strict=True)):
        for position in range(prompt, prompt + response):
            rows[b, position] = len(rows)
    return rows


def test_rows_are_counted_rollout_after_rollout() -> None:
    index, expected = index_of([0, 1, 2]), oracle_rows()
    rollout, position = (torch.tensor(column) for column in zip(*expected, strict=True))
    assert index.rows(rollout, position).tolist() == list(expected.values())
    assert index.first_row.tolist() == [0, 3, 9]


def test_each_row_is_made_one_position_before_its_target() -> None:
    rollout, position = index_of([0, 1, 2]).teacher_positions()
    assert list(zip(rollout.tolist(), (position + 1).tolist(), strict=True)) == list(oracle_rows())


def test_first_response_token_uses_the_last_prompt_token() -> None:
    index = index_of([0, 1, 2])
    _, position = index.teacher_positions()
    assert position[index.first_row].tolist() == [length - 1 for length in PROMPT_LEN]


def test_gathered_causal_log_probs_are_the_plain_ones_shifted_by_one() -> None:
    index, width = index_of([0, 1, 2]), 9
    log_probs = torch.randn(3, width, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    packed = index.gather(log_probs)
    for (b, position), row in oracle_rows().items():
        assert torch.equal(packed[row], log_probs[b, position - 1])


def test_rollouts_end_to_end_give_the_rows_of_rollouts_apart() -> None:
    for rollouts in ([0, 1, 2], [2, 0, 1], [1]):
        index = index_of(rollouts)
        output = torch.randn(len(rollouts), 9, 7, generator=torch.Generator().manual_seed(0))
        lengths = (index.prompt_len + index.response_len).tolist()
        end_to_end = torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)] + [output[0, :2]])
        assert torch.equal(index.gather_packed(end_to_end[None]), index.gather(output))


def test_any_rollouts_in_any_order_find_their_rows() -> None:
    index, expected = index_of([0, 1, 2]), oracle_rows()
    asked = [(2, 8), (0, 5), (1, 3), (0, 5)]  # as the copies of shuffled rollouts ask
    rollout, position = (torch.tensor(column) for column in zip(*asked, strict=True))
    assert index.rows(rollout, position).tolist() == [expected[each] for each in asked]


@pytest.mark.parametrize("position", [4, 8])
def test_positions_outside_the_response_have_no_target(position: int) -> None:
    with pytest.raises(AssertionError, match="only response positions"):
        index_of([0, 1, 2]).rows(torch.tensor([0]), torch.tensor([position]))


def test_an_empty_prompt_or_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt_len=\[0, 2\] .*at least 1 token"):
        TargetIndex(torch.tensor([0, 2]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"response_len=\[1, 0\] .*at least 1 token"):
        TargetIndex(torch.tensor([2, 2]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"prompt_len\.shape=\(2,\)"):
        TargetIndex(torch.tensor([2, 2]), torch.tensor([1]))

"""The row ``[prompt | clean | state copy 1 | .. | state copy c]``: the only file that knows where its tokens stand.

Everything else lives on the canvas ``[B, L]`` of absolute positions. With r = P mod b and p = P - r, a state copy
covers positions p .. p + n - 1: it opens with its own copy of the r prompt tokens that share the first response block,
because at inference those attend to the masks of their block, so that their keys differ from state to state.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.masks import CLEAN_STREAM, PADDING_DOCUMENT, TokenAttributes
from nemo_opdlm.diffusion.state_selection import DenoisingState
from nemo_opdlm.diffusion.trajectory import Trajectory


class SupervisedIndex(NamedTuple):
    """Where the M supervised tokens of a batch stand, int64 ``[M]`` each, in row-major order of the rows.

    ``hidden[row, column]`` gathers from two-stream rows, ``x[document, copy, position]`` from a canvas ``[B, C, L]``, and
    the teacher's target is that of ``(document, position)``. Documents are numbered as the rollouts of the batch; a row
    that is not packed is one document.
    """

    row: Tensor
    column: Tensor
    document: Tensor
    copy: Tensor
    position: Tensor


@dataclass(frozen=True)
class BlockLayout:
    """Index arithmetic of two-stream rows on the absolute block grid.

    Attributes:
        prompt_len: P, int64 ``[B]``.
        response_len: R, int64 ``[B]``.
        num_states: c, state copies of each row, int64 ``[B]``; 0 leaves ``[prompt | clean]``.
        block_size: b.
    """

    prompt_len: Tensor
    response_len: Tensor
    num_states: Tensor
    block_size: int

    @property
    def remainder(self) -> Tensor:
        """r = P mod b, prompt tokens in the first response block."""
        return self.prompt_len % self.block_size

    @property
    def prefix_len(self) -> Tensor:
        """p = P - r, prompt tokens in whole blocks."""
        return self.prompt_len - self.remainder

    @property
    def stream_len(self) -> Tensor:
        """n = b * ceil((r + R) / b), tokens of one state copy."""
        return self.block_size * (-(-(self.remainder + self.response_len) // self.block_size))

    @property
    def row_len(self) -> Tensor:
        """N = p + n + c * n."""
        return self.prefix_len + self.stream_len * (1 + self.num_states)

    def attributes(self, width: int | None = None) -> TokenAttributes:
        """Attributes ``[B, width]`` of every token; ``width`` defaults to the longest row. The document is the row."""
        streams, positions, is_token = self._columns(width)
        rows = torch.arange(streams.shape[0], device=streams.device)[:, None].expand_as(streams)
        documents = rows.masked_fill(~is_token, PADDING_DOCUMENT)
        return TokenAttributes(documents, streams, positions, positions // self.block_size)

    def gather(self, clean: Tensor, states: Tensor, width: int | None = None) -> Tensor:
        """Lay out canvases ``[B, L]`` and ``[B, C, L]`` of any type as rows ``[B, width]``; padding gets 0."""
        streams, positions, is_token = self._columns(width)
        canvases = torch.cat([clean[:, None], states], 1)
        columns = canvases.flatten(1).gather(1, streams * canvases.shape[-1] + positions)
        return columns.masked_fill(~is_token, 0)

    def _columns(self, width: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Stream, absolute position and existence of every column, each ``[B, width]``; 0, 0 and False in padding."""
        row_len = self.row_len[:, None]
        width = int(row_len.max()) if width is None else width
        column = torch.arange(width, device=row_len.device).expand(row_len.shape[0], -1)
        prefix, stream = self.prefix_len[:, None], self.stream_len[:, None]
        # Column p + s * n + o holds offset o of stream s: the clean stream is the copy number 0 behind the prefix.
        behind_prefix = (column - prefix).clamp(min=0)
        streams = behind_prefix // stream
        positions = torch.where(column < prefix, column, prefix + behind_prefix % stream)
        is_token = column < row_len
        return streams * is_token, positions * is_token, is_token


@dataclass(frozen=True)
class TwoStreamRows:
    """What the student reads in training, and where it is judged.

    Attributes:
        token_ids: int64 ``[B, N]``, 0 in padding.
        attributes: of each token, ``[B, N]``; the document is the number of the rollout, that of a causal copy B more.
        loss_mask: bool ``[B, N]``, supervised state positions.
        causal_mask: bool ``[B, N]``, tokens of causal copies that are judged by the response token behind them.
        num_rollouts: B of the rows as they were before they were packed.
    """

    token_ids: Tensor
    attributes: TokenAttributes
    loss_mask: Tensor
    causal_mask: Tensor
    num_rollouts: int

    def index(self, rows: slice) -> "TwoStreamRows":
        """Some of the rows; documents keep their numbers."""
        return self._map(lambda x: x[rows], self.attributes.map(lambda x: x[rows]))

    def columns(self, columns: Tensor) -> "TwoStreamRows":
        """Some of the columns of all rows: a context-parallel rank's share."""
        return self._map(lambda x: x[:, columns], self.attributes.map(lambda x: x[:, columns]))

    def packed(self, multiple_of: int = 1) -> "TwoStreamRows":
        """The same documents one behind the other in a single row ``[1, N]``, padded to a multiple of ``multiple_of``."""
        end_to_end = _end_to_end(self.attributes, multiple_of)
        return self._map(end_to_end, _packed(self.attributes, end_to_end))

    def _map(self, function: Callable[[Tensor], Tensor], attributes: TokenAttributes) -> "TwoStreamRows":
        masks = function(self.loss_mask), function(self.causal_mask)
        return TwoStreamRows(function(self.token_ids), attributes, *masks, self.num_rollouts)

    @property
    def copy_ids(self) -> Tensor:
        """State copy of each token from 0, int64 ``[B, N]``; -1 for prompt, clean and padding tokens."""
        return self.attributes.stream_ids - 1

    @property
    def supervised_index(self) -> SupervisedIndex:
        """Rows, columns, documents, copies and absolute positions of the supervised tokens."""
        row, column = self.loss_mask.nonzero(as_tuple=True)
        documents, positions = self.attributes.document_ids, self.attributes.position_ids
        return SupervisedIndex(row, column, documents[row, column], self.copy_ids[row, column], positions[row, column])

    @property
    def causal_index(self) -> SupervisedIndex:
        """The same of the judged tokens of causal copies, with the positions of the tokens that judge them."""
        row, column = self.causal_mask.nonzero(as_tuple=True)
        documents, positions = self.attributes.document_ids - self.num_rollouts, self.attributes.position_ids + 1
        return SupervisedIndex(row, column, documents[row, column], self.copy_ids[row, column], positions[row, column])


def row_layout(trajectory: Trajectory, states: DenoisingState) -> BlockLayout:
    """Where the tokens of these rollouts and their states stand."""
    return BlockLayout(trajectory.prompt_len, trajectory.response_len, states.num_states, trajectory.block_size)


def row_lengths(trajectory: Trajectory, states: DenoisingState, has_causal_copy: bool = False) -> Tensor:
    """Tokens of each of the rows, ``[B]``."""
    causal = trajectory.prompt_len + trajectory.response_len
    return row_layout(trajectory, states).row_len + causal * has_causal_copy


def two_stream_rows(
    trajectory: Trajectory, states: DenoisingState, multiple_of: int = 1, has_causal_copy: bool = False
) -> TwoStreamRows:
    """Rows ``[prompt | clean | state x c]`` of a batch, padded to a multiple of ``multiple_of`` columns.

    With a causal copy a second document ``[prompt | response]`` follows in each row.
    """
    layout = row_layout(trajectory, states)
    width = int(layout.row_len.max())
    if not has_causal_copy:
        width = -(-width // multiple_of) * multiple_of
    clean_has_no_loss = torch.zeros_like(trajectory.token_ids, dtype=torch.bool)
    loss_mask = layout.gather(clean_has_no_loss, states.loss_mask, width)
    rows = TwoStreamRows(
        layout.gather(trajectory.token_ids, states.state_ids, width),
        layout.attributes(width),
        loss_mask,
        torch.zeros_like(loss_mask),
        len(trajectory),
    )
    return _with_causal_copy(rows, trajectory, multiple_of) if has_causal_copy else rows


def _with_causal_copy(rows: TwoStreamRows, trajectory: Trajectory, multiple_of: int) -> TwoStreamRows:
    width = rows.token_ids.shape[1]
    token_ids, copy = clean_rows(trajectory)
    missing = -(width + token_ids.shape[1]) % multiple_of
    is_token, behind = copy.document_ids != PADDING_DOCUMENT, copy.position_ids + 1
    documents = torch.where(is_token, copy.document_ids + len(trajectory), PADDING_DOCUMENT)
    # In blocks of one token the rule of clean tokens is the causal one.
    copy = replace(copy, document_ids=documents, block_ids=copy.position_ids)
    prompt_end, end = trajectory.prompt_len[:, None], (trajectory.prompt_len + trajectory.response_len)[:, None]
    is_judged = is_token & (behind >= prompt_end) & (behind < end)

    def join(left: Tensor, right: Tensor, value: int = 0) -> Tensor:
        return F.pad(torch.cat([left, right], 1), (0, missing), value=value)

    attributes = TokenAttributes(
        join(rows.attributes.document_ids, copy.document_ids, PADDING_DOCUMENT),
        join(rows.attributes.stream_ids, copy.stream_ids),
        join(rows.attributes.position_ids, copy.position_ids),
        join(rows.attributes.block_ids, copy.block_ids),
    )
    no_state = torch.zeros_like(is_judged)
    masks = join(rows.loss_mask, no_state), join(rows.causal_mask, is_judged)
    return TwoStreamRows(join(rows.token_ids, token_ids), attributes, *masks, len(trajectory))


def _end_to_end(attributes: TokenAttributes, multiple_of: int) -> Callable[..., Tensor]:
    """A function that lays what each token has, ``[B, N]``, end to end as ``[1, N']``; padding gets 0 or another value."""
    is_token = attributes.document_ids != PADDING_DOCUMENT
    missing = -int(is_token.sum()) % multiple_of

    def end_to_end(x: Tensor, value: int = 0) -> Tensor:
        return F.pad(x[is_token], (0, missing), value=value)[None]

    return end_to_end


def _packed(attributes: TokenAttributes, end_to_end: Callable[..., Tensor]) -> TokenAttributes:
    documents = end_to_end(attributes.document_ids, PADDING_DOCUMENT)
    return replace(attributes.map(end_to_end), document_ids=documents)


def share_of_columns(width: int, rank: int, num_ranks: int) -> Tensor:
    """Columns of a row that a context-parallel rank holds: the pieces number ``rank`` and ``-1 - rank`` of 2 * num_ranks.

    What a query sees grows along the clean stream and again along each state copy, so a piece from the front and one from
    the back give every rank about the same work. ``width`` has to be a multiple of 2 * num_ranks.
    """
    assert width % (2 * num_ranks) == 0, (width, num_ranks)
    pieces = torch.arange(width).chunk(2 * num_ranks)
    return torch.cat([pieces[rank], pieces[-1 - rank]])


def clean_rows(trajectory: Trajectory, multiple_of: int = 1) -> tuple[Tensor, TokenAttributes]:
    """``[prompt | response]`` for a causal pass: ids ``[B, Nc]`` (0 in padding) and attributes; column = position.

    The rest of the final block is left out: no target comes from it. Rows are padded to a multiple of ``multiple_of``.
    """
    total = (trajectory.prompt_len + trajectory.response_len)[:, None]
    width = -(-int(total.max()) // multiple_of) * multiple_of
    positions = torch.arange(width, device=total.device).expand(total.shape[0], -1)
    is_token = positions < total
    rows = torch.arange(total.shape[0], device=total.device)[:, None].expand_as(positions)
    positions = positions * is_token
    token_ids = trajectory.token_ids.gather(1, positions).masked_fill(~is_token, 0)
    documents = rows.masked_fill(~is_token, PADDING_DOCUMENT)
    streams = torch.full_like(positions, CLEAN_STREAM)
    return token_ids, TokenAttributes(documents, streams, positions, positions // trajectory.block_size)


def packed_clean_rows(trajectory: Trajectory, multiple_of: int = 1) -> tuple[Tensor, TokenAttributes]:
    """The tokens of `clean_rows` one document behind the other: ids and attributes ``[1, sum(P + R)]``, and padding."""
    token_ids, attributes = clean_rows(trajectory)
    end_to_end = _end_to_end(attributes, multiple_of)
    return end_to_end(token_ids), _packed(attributes, end_to_end)

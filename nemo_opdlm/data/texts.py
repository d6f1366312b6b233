"""Texts as token ids, end to end in one tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """n tokenised texts.

    token_ids   int64 [sum L]   all texts end to end
    offsets     int64 [n + 1]   text i is token_ids[offsets[i]:offsets[i + 1]]
    """

    token_ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], **others: object) -> Self:
        """Lay lists of token ids end to end; `others` are the fields of a subclass."""
        return cls(
            token_ids=torch.tensor([token for ids in lists for token in ids], dtype=torch.int64),
            offsets=torch.tensor(list(accumulate(map(len, lists), initial=0)), dtype=torch.int64),
            **others,
        )

    def __len__(self) -> int:
        """Number of texts."""
        return self.offsets.numel() - 1

    def __getitem__(self, index: int) -> Tensor:
        """Text `index` as int64 [L], a view. Negative indices raise IndexError: a schedule never makes one."""
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Tensor]:
        """Every text in file order."""
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> Tensor:
        """Tokens per text, int64 [n]."""
        return self.offsets.diff()

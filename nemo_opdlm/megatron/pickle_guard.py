"""Refuses pickles that would bring down the process before an allow-list is asked for the first name in them.

A tuple as a key is hashed on the C stack, which some million nested tuples overflow; the memo gets as many places as the
largest index in it says. Both take a file of a megabyte. Numbers and texts cannot hurt: they are as long as they say.
"""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

#: Tuples within tuples; what trainers store is a few levels deep.
MAX_DEPTH = 1000
#: Pickles one after the other in a file that torch < 1.6 wrote, before its tensors.
_LEGACY_PICKLES = 5
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_MEMO_WRITES, _MEMO_READS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")


def check_pickle(stream: IO[bytes], size: int) -> None:
    """Follow one pickle without building anything, up to its end.

    Args:
        stream: at the start of the pickle.
        size: bytes of the file.

    Raises:
        ValueError: it is damaged.
        pickle.UnpicklingError: it nests tuples without end, or has a memo larger than the file.
    """
    stack: list[int] = []  # how deep tuples are nested in each value; only what is immutable can be hashed
    marks: list[int] = []
    memo: dict[int, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            # Where the memo is named, the argument is a place in it.
            if name in _MEMO_WRITES:
                assert isinstance(argument, int)
                if argument > size:
                    raise pickle.UnpicklingError("its memo is larger than the file")
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in _MEMO_READS:
                assert isinstance(argument, int)
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "DUP":
                stack.append(stack[-1])
            else:
                _apply(opcode, stack, marks)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError("no whole pickle") from error


def _apply(opcode: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> None:
    taken = [kind for kind in opcode.stack_before if kind is not pickletools.markobject]
    if len(taken) != len(opcode.stack_before):
        start = marks.pop() - (len(taken) - 1 if pickletools.stackslice in taken else len(taken))
    else:
        start = len(stack) - len(taken)
    if start < 0:
        raise IndexError
    depth = max(stack[start:], default=0) + 1 if opcode.name in _TUPLES else 0
    if depth > MAX_DEPTH:
        raise pickle.UnpicklingError(f"tuples are nested more than {MAX_DEPTH} deep")
    stack[start:] = [depth] * len(opcode.stack_after)


def check_torch_file(source: Path | IO[bytes]) -> None:
    """Check the pickles in what `torch.save` wrote.

    Args:
        source: path or stream, which is rewound.

    Raises:
        pickle.UnpicklingError: as `check_pickle`.
        Exception: it is damaged; of many kinds.
    """
    if isinstance(source, Path):
        with source.open("rb") as stream:
            check_torch_file(stream)
        return
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    if is_zip(source):
        with zipfile.ZipFile(source) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise pickle.UnpicklingError("it is compressed, which torch never does")
        source.seek(0)
        # torch's own reader: another one might find another pickle in a file made for both.
        content = torch._C.PyTorchFileReader(source).get_record("data.pkl")
        check_pickle(io.BytesIO(content), len(content))
    else:
        source.seek(0)
        is_legacy = source.read(len(_LEGACY_START)) == _LEGACY_START
        source.seek(0)
        for _ in range(_LEGACY_PICKLES if is_legacy else 1):
            check_pickle(source, size)
        if not is_legacy:
            raise pickle.UnpicklingError("a pickle that torch did not write")
    source.seek(0)


def is_zip(source: Path | IO[bytes]) -> bool:
    """Whether it is a zip file, as torch >= 1.6 writes; False for one that is damaged beyond telling."""
    try:
        return zipfile.is_zipfile(source)
    except zipfile.BadZipFile:
        return False


def is_stored(tensor: Tensor) -> bool:
    """Whether every value of a tensor was in the file: one of few numbers may claim any shape by its strides."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()

"""Archives as tar files."""

import gzip
import shutil
import tarfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from tests.fuzz import mutations
from tests.fuzz.checkpoints import Folder, nemo, read_checkpoint
from tests.integration import foreign_samples


def archive(folder: Path) -> Folder:
    """An archive as a file."""
    source = nemo(folder / "source")
    packed = foreign_samples.pack(source.path)
    (folder / "checkpoint").mkdir()
    path = packed.rename(folder / "checkpoint" / "model.nemo")
    shutil.rmtree(folder / "source")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    sizes = [offset + 124 for offset in headers]
    edits = (
        mutations.edited_bytes(whole, tokens=_TAR, hot=headers, reach=511),
        mutations.edited_bytes(whole, tokens=_TAR, hot=headers, reach=511).map(_with_checksums),
        mutations.edited_bytes(whole, tokens=_TAR, hot=sizes, reach=40).map(_with_checksums),
        _members(whole),
        mutations.edited_bytes(gzip.compress(whole, 1), hot=(0,), reach=4096),
    )
    return Folder(path.parent, {path.name: st.one_of(edits)}, lambda folder: read_checkpoint(folder / path.name))


_TAR = (
    *(
        b"0",
        b"1",
        b"2",
        b"3",
        b"4",
        b"5",
        b"6",
        b"7",
        b"L",
        b"K",
        b"x",
        b"g",
        b"S",
        b"V",
        b"D",
        b"\0",
        b"\x80",
        b"\xff" * 12,
    ),
    *(
        b"\x80" + b"\xff" * 11,
        b"77777777777\0",
        b"../",
        b"/etc/",
        b"ustar\x0000",
        b"ustar  \0",
        b"20 size=9999999999\n",
        b"11 path=..\n",
    ),
    *(b"12 size=-512\n", b"0 x=y\n", b"22 GNU.sparse.major=1\n", bytes(512)),
)


def _with_checksums(data: bytes) -> bytes:
    """Headers whose checksum is right again, so that what else is in them counts."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


@st.composite
def _members(draw: DrawFn, whole: bytes) -> bytes:
    """An archive with one member more, anywhere; its header's checksum is right."""
    name = draw(
        st.sampled_from(
            ("./x", "../x", "/x", "./model_config.yaml", "model_weights/.metadata", "a/" * 400 + "x", ".", "", "x\ny")
        )
        | st.text(max_size=20).map(lambda text: text.replace("\0", ""))
    )
    member = tarfile.TarInfo(name)
    member.type = draw(
        st.sampled_from((b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"X", b"\0"))
    )
    member.linkname = draw(st.sampled_from(("", "/etc/passwd", "../x", "model_config.yaml")))
    member.size = draw(st.sampled_from((0, 0, 5, 512, 2**33, 2**62, -512, -1024, -(2**40))))
    member.pax_headers = draw(
        st.sampled_from(
            (
                {},
                {"size": "-512"},
                {"size": "99999999999"},
                {"size": "x"},
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
            )
        )
    )
    header = member.tobuf(draw(st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))), errors="surrogatepass")
    body = draw(
        st.sampled_from(
            (b"", b"x".ljust(512, b"\0"), b"16 path=../evil\n".ljust(512, b"\0"), b"13 size=-512\n".ljust(512, b"\0"))
        )
    )
    at = 512 * draw(st.integers(0, len(whole) // 512))
    return whole[:at] + header * draw(st.sampled_from((1, 1, 1, 2, 600))) + body + whole[at:]

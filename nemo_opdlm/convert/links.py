"""Links in folders from elsewhere: what they show would become part of the converted model."""

import os
from collections.abc import Iterable
from pathlib import Path


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse files of a folder that are links to elsewhere.

    The hub's own cache, `snapshots/<revision>/<file>` as links to `blobs/`, is one folder in this respect.

    Raises:
        ValueError: a file leads out of the folder.
    """
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in names:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise ValueError(f"{folder / name} is a link that leads out of its folder; copy the file instead")


def check_tree(folder: Path) -> None:
    """Refuse a folder in which anything, at any depth, is a link to elsewhere.

    Raises:
        ValueError: there is one.
    """
    for place, folders, files in os.walk(folder):
        found = (Path(place, name) for name in (*folders, *files))
        check_links(folder, [str(path.relative_to(folder)) for path in found if path.is_symlink()])

"""Copies of the repository in which mutants are tried: the user's own files are never touched."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path


class NoRepository(Exception):
    """There is no list of the repository's files to copy; the message is one line."""


def tracked_files(root: Path) -> list[str]:
    """Files that git tracks and that exist, relative to `root`."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise NoRepository("git is not installed; it names the files to copy") from None
    except subprocess.CalledProcessError as error:
        raise NoRepository(f"git names no files of {root}: {' '.join(error.stderr.split())}") from None
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


def copy_tree(root: Path, files: Iterable[str], into: Path) -> Path:
    """Copy these files of `root` into a new folder; returns the folder."""
    for name in files:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, into / name)
    return into

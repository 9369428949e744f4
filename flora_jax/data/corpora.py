"""Named text corpora: what every Python carries, and what Debian packages install.

``python-docs`` (reference prose), ``python-docstrings`` and ``python-stdlib`` (source text) need
nothing but Python. The others name the package to install when their files are missing.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gzip
import importlib
import subprocess
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable
from pathlib import Path

from flora_jax.core.errors import ConfigError, FormatError, unknown
from flora_jax.data.documents import Document, InMemory, Source

_SHARE = Path("/usr/share")
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A named corpus: how to read it and where it comes from."""

    name: str
    about: str
    install: str
    read: Callable[[], Source]


class PythonFiles:
    """One document per module of the running Python's standard library, tests left out.

    Args:
        docstrings: give the module's docstrings instead of its source.
    """

    def __init__(self, docstrings: bool = False):
        self._root = Path(sysconfig.get_paths()["stdlib"])
        self._docstrings = docstrings
        self._paths = sorted(
            path
            for path in self._root.rglob("*.py")
            if not _TEST_FOLDERS & set(path.relative_to(self._root).parts) and path.stat().st_size
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Document:
        path = self._paths[index]
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            raise FormatError(f"{path}: not Python source: {error}") from None
        return Document.plain(_docstrings(text) if self._docstrings else text)

    def name(self, index: int) -> str:
        return self._paths[index].relative_to(self._root).as_posix()


def _docstrings(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except SyntaxError:
        return ""  # A few library files are templates or of another Python version.
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def _python_docs() -> Source:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ConfigError(
            f"corpus 'python-docs': this Python ({sys.executable}) lacks pydoc_data.topics; "
            "use 'python-docstrings' or a full Python"
        ) from None
    names = sorted(topics)
    return InMemory([Document.plain(topics[n]) for n in names], [f"topic {n!r}" for n in names])


def _kjv() -> Source:
    """The King James Bible, one document per chapter, through Debian's ``bible`` program."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    try:
        text = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()
    except (OSError, subprocess.SubprocessError) as error:
        raise FileNotFoundError(f"the program 'bible' failed ({error})") from None
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        place, _, verse = line.partition(" ")
        chapters.setdefault(place.partition(":")[0], []).append(verse)
    return InMemory([Document.plain("\n".join(v)) for v in chapters.values()], list(chapters))


def fortune_files(root: Path = _SHARE) -> dict[str, list[str]]:
    """Epigrams by topic file."""
    folder = root / "games" / "fortunes"
    paths = sorted(p for p in folder.iterdir() if p.is_file() and "." not in p.name)
    parts = {p.name: p.read_text("utf-8", "replace").split("\n%\n") for p in paths}
    return {name: [t.strip() for t in texts if t.strip(" %\n")] for name, texts in parts.items()}


def _fortunes(root: Path = _SHARE) -> Source:
    files = fortune_files(root)
    texts = [(f"{name} {k}", text) for name, part in files.items() for k, text in enumerate(part)]
    return InMemory([Document.plain(text) for _, text in texts], [name for name, _ in texts])


def _dictd(book: str, root: Path = _SHARE) -> Source:
    """The entries of a dictd dictionary; an index line is ``word, offset, length`` in base 64."""
    folder = root / "dictd"
    with gzip.open(folder / f"{book}.dict.dz") as file:
        data = file.read()
    entries: dict[tuple[int, int], str] = {}
    for line in (folder / f"{book}.index").read_text("utf-8").splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00"):
            entries.setdefault((_base64(offset), _base64(length)), word)
    spans = sorted(entries)
    texts = [data[at : at + size].decode("utf-8", "replace").strip() for at, size in spans]
    return InMemory([Document.plain(t) for t in texts], [f"{book} {entries[s]!r}" for s in spans])


def _base64(digits: str) -> int:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return functools.reduce(lambda n, c: 64 * n + alphabet.index(c), digits, 0)


def wordnet_glosses(part: str, root: Path = _SHARE) -> list[tuple[int, str]]:
    """``(lexicographer file number, "words: gloss")`` of every synset of noun, verb, adj or adv."""
    out = []
    with open(root / "wordnet" / f"data.{part}", encoding="utf-8") as file:
        for line in file:
            if line.startswith("  "):  # The licence.
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split(" ")
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            text = f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}"
            out.append((int(fields[1]), text))
    return out


def _wordnet(root: Path = _SHARE) -> Source:
    parts = {p: wordnet_glosses(p, root) for p in ("noun", "verb", "adj", "adv")}
    texts = [(f"{p} {k}", t) for p, part in parts.items() for k, (_, t) in enumerate(part)]
    return InMemory([Document.plain(text) for _, text in texts], [name for name, _ in texts])


def _apt(package: str) -> str:
    return f"apt-get install {package}"


CORPORA = {
    c.name: c
    for c in (
        Corpus(
            name="python-docs",
            about="79 topics of the language reference, 0.5 MB of English prose",
            install="a full Python",
            read=_python_docs,
        ),
        Corpus(
            name="python-docstrings",
            about="docstrings of the standard library, one document per module",
            install="a full Python",
            read=lambda: PythonFiles(docstrings=True),
        ),
        Corpus(
            name="python-stdlib",
            about="source text of the standard library without its tests",
            install="a full Python",
            read=PythonFiles,
        ),
        Corpus(
            name="kjv",
            about="King James Bible, 1,189 chapters, 4.4 MB",
            install=_apt("bible-kjv"),
            read=_kjv,
        ),
        Corpus(
            name="fortunes",
            about="15,000 epigrams in 43 topics, 2.6 MB",
            install=_apt("fortunes"),
            read=_fortunes,
        ),
        Corpus(
            name="foldoc",
            about="Free On-line Dictionary of Computing, 5.6 MB",
            install=_apt("dict-foldoc"),
            read=lambda: _dictd("foldoc"),
        ),
        Corpus(
            name="gcide",
            about="Webster's dictionary of 1913 and later, 40 MB",
            install=_apt("dict-gcide"),
            read=lambda: _dictd("gcide"),
        ),
        Corpus(
            name="wordnet",
            about="words and glosses of WordNet 3.0, 117,659 synsets",
            install=_apt("wordnet-base"),
            read=_wordnet,
        ),
    )
}


def load_corpus(name: str) -> Source:
    """The documents of a named corpus.

    Raises:
        ConfigError: unknown name (with the nearest ones), or what to install.
    """
    if name not in CORPORA:
        raise ConfigError(unknown("corpus", name, CORPORA))
    corpus = CORPORA[name]
    try:
        return corpus.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"corpus {name!r} is not installed: {error}; install it with: {corpus.install}"
        ) from None

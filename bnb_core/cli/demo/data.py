"""Text from the machine the demo runs on, as bytes: one byte is one token."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BadInput
from .settings import Settings

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".html", ".tex"})
VOCABULARY = 256
MAX_BYTES = 64 * 2**20
MIN_BYTES = 4096
HELD_OUT_SHARE = 10
NOT_LIBRARY_SOURCE = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Two one-dimensional uint8 tensors, split by file so that no file is in both."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor
    files: int


def source_code(folder: Path | None) -> Corpus:
    """The text to train on: the user's own folder, or the standard library's source.

    Raises:
        BadInput: the folder does not exist or holds too little text.
    """
    if folder is not None:
        return _corpus(f"text files under {folder}", _read(_user_files(folder)))
    return _corpus("source code of Python's standard library", _read(_library_files()))


def documentation() -> Corpus:
    """The text to fine-tune on: the documentation strings of the standard library.

    Raises:
        BadInput: the standard library's source is not installed as files.
    """
    documents = map(_docstrings, _read(_library_files()))
    return _corpus("documentation strings of Python's standard library", documents)


def random_batch(tokens: torch.Tensor, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """`[batch_size, context + 1]` int64: windows at random places of `tokens`."""
    starts = torch.randint(len(tokens) - settings.context, (settings.batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(settings.context + 1)].long().to(settings.device)


def evaluation_windows(tokens: torch.Tensor, settings: Settings) -> torch.Tensor:
    """`[windows, context + 1]` int64: windows evenly spread over `tokens`, the same on every call."""
    last_start = len(tokens) - settings.context - 1
    starts = torch.linspace(0, last_start, settings.evaluation_windows, dtype=torch.float64).long()
    return tokens[starts[:, None] + torch.arange(settings.context + 1)].long()


def _library_files() -> list[tuple[str, Path]]:
    library = Path(sysconfig.get_path("stdlib"))
    files = ((path.relative_to(library), path) for path in library.rglob("*.py"))
    return [(str(name), path) for name, path in files if NOT_LIBRARY_SOURCE.isdisjoint(name.parts)]


def _user_files(folder: Path) -> list[tuple[str, Path]]:
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise BadInput(f"--data: cannot read {folder}: {error.strerror}") from None
    if not is_folder:
        raise BadInput(f"--data: {folder} is not a folder; give a folder of text files")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES and path.is_file())
    return [(str(path.relative_to(folder)), path) for path in files]


def _read(files: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """The text of each file, in the order of the hash of its name: fixed, but not alphabetical."""
    total = 0
    for _, path in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        total += len(text)
        if total > MAX_BYTES:
            return
        yield text


def _docstrings(source: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    except (SyntaxError, ValueError):
        return ""
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _corpus(name: str, documents: Iterable[str]) -> Corpus:
    texts = [text.encode() for text in documents if text.strip()]
    size = sum(map(len, texts))
    if size < MIN_BYTES:
        raise BadInput(f"no text to learn from: {size} bytes found in {name}, at least {MIN_BYTES} are needed")
    held_out = max(1, len(texts) // HELD_OUT_SHARE)
    train_texts, held_out_texts = texts[held_out:], texts[:held_out]
    if len(texts) == 1:
        cut = size - size // HELD_OUT_SHARE
        train_texts, held_out_texts = [texts[0][:cut]], [texts[0][cut:]]
    return Corpus(name, _tokens(train_texts), _tokens(held_out_texts), len(texts))


def _tokens(texts: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)

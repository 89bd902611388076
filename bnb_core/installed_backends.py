"""The backends of the installed packages: those of the entry-point group ``bnb_core.backends``.

Ours and other people's are found alike, and each is imported when it is first asked for. One that fails to import is
unavailable, with its reason, and disturbs nobody; so is a package whose entry points cannot be read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points

from bnb_core.backend import Backend, BackendError, SettingError, in_words

ENTRY_POINT_GROUP = "bnb_core.backends"
OUR_MODULES = "bnb_core.backends."


def installed_entry_points(group: str) -> tuple[list[EntryPoint], dict[str, str]]:
    """Those of the group, and the packages whose entry points cannot be read, each with the reason."""
    try:
        return list(entry_points(group=group)), {}
    except Exception:
        return _readable_entry_points(group)


def _readable_entry_points(group: str) -> tuple[list[EntryPoint], dict[str, str]]:
    """Package by package, the first of each name, as Python's own search does that gives up at the first bad one."""
    found: dict[str, Sequence[EntryPoint]] = {}
    unreadable: dict[str, str] = {}
    for distribution in distributions():
        name = _name_of(distribution)
        if name in found or name in unreadable:
            continue
        try:
            found[name] = tuple(distribution.entry_points.select(group=group))
        except Exception as error:
            unreadable[name] = in_words(error)
    return [entry for entries in found.values() for entry in entries], unreadable


def _name_of(distribution: Distribution) -> str:
    """As pip compares them; of a package that does not tell its name, where its metadata lie."""
    try:
        return re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    except Exception:
        return str(getattr(distribution, "_path", distribution))


@cache
def _offers() -> tuple[dict[str, list[EntryPoint]], dict[str, str]]:
    """The entry points of every backend by name, and the packages that cannot be asked for theirs."""
    entries, unreadable = installed_entry_points(ENTRY_POINT_GROUP)
    found: dict[str, list[EntryPoint]] = {}
    for entry in entries:
        found.setdefault(entry.name, []).append(entry)
    if not found:
        raise BackendError(
            f"no backend is registered under the entry-point group {ENTRY_POINT_GROUP!r}: "
            "bnb_core is not installed; run `pip install .` (or `pip install -e .`) in its source folder"
        )
    return found, unreadable


def names() -> set[str]:
    """Of every backend that is offered, and of the packages that cannot be asked for theirs."""
    found, unreadable = _offers()
    return {*found, *unreadable}


@cache
def load(name: str) -> Backend:
    """The backend of that entry point; one that fails to load is unavailable with the error as the reason.

    So is one that several installed packages offer: none of them is preferred, and a warning names them all. A package
    whose entry points cannot be read stands under its own name.

    Raises:
        SettingError: an environment variable that the backend reads has a value that cannot be used.
    """
    found, unreadable = _offers()
    if name not in found:
        reason = f"the entry points of the package {name} cannot be read: {unreadable[name]}"
        return Backend(name, (), 0, {}, unavailable=reason)
    entry, *others = found[name]
    if others:
        offers = sorted(f"{o.dist.name if o.dist else 'unknown'} ({o.value})" for o in (entry, *others))
        reason = f"several installed packages offer a backend of this name, uninstall all but one: {', '.join(offers)}"
        warnings.warn(f"backend {name!r} is not available: {reason}", stacklevel=2)
        return Backend(name, (), 0, {}, unavailable=reason)
    try:
        backend = entry.load()
        if not isinstance(backend, Backend):
            raise TypeError(f"{entry.value} is a {type(backend).__name__}, expected a bnb_core.backend.Backend")
        if backend.name != name:
            raise ValueError(f"its entry point is called {name!r}, the backend {backend.name!r}; expected one name")
        return backend
    except (SettingError, KeyboardInterrupt):
        raise
    except BaseException as error:
        reason = f"importing {entry.value} failed: {in_words(error)}"
        return Backend(name, (), 0, {}, unavailable=reason)


def is_ours(name: str) -> bool:
    """Whether the backend comes with bnb_core."""
    return all(entry.value.startswith(OUR_MODULES) for entry in _offers()[0].get(name, []))

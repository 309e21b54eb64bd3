"""``Registry``: entries of one kind by name, with targets that are imported when they are first loaded.

Another package adds entries with :meth:`Registry.register`, or declares entry points in its ``pyproject.toml``::

    [project.entry-points."remend.datasets"]
    mine = "my_package.my_module:DATA_SET"

An entry point names a registry entry (such as a :class:`remend.registries.DataSet`), which has help and further fields,
or the target itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from remend.errors import RegistryError, nearest


@dataclass(frozen=True, eq=False)
class RegistryEntry:
    """A name and what it stands for. Each kind of thing has a subclass with its further fields.

    Attributes:
        name: the name by which users select the entry.
        target: ``"module:attribute"``, or the object itself.
        help: one line for the command line and the documentation.
    """

    name: str
    target: object
    help: str = ""


EntryT = TypeVar("EntryT", bound=RegistryEntry)


class Registry(Generic[EntryT]):
    """Entries of one kind by name: those of remend, those that were registered, and those of installed packages.

    Args:
        kind: what an entry is, for messages (``"data set"``).
        group: the group of entry points under which other packages declare entries.
        entry_type: the class of the entries.
        entries: the entries of remend.
    """

    def __init__(self, kind: str, group: str, entry_type: type[EntryT], entries: Iterable[EntryT] = ()) -> None:
        self.kind = kind
        self.group = group
        self._entry_type = entry_type
        self._entries: dict[str, EntryT] = {}
        for entry in entries:
            self._add(entry)

    def names(self) -> list[str]:
        """List all names: remend's in their order, then those that were registered, then those of entry points."""
        return list(dict.fromkeys((*self._entries, *self._entry_points)))

    def registered_names(self) -> list[str]:
        """List the names of remend and those that were registered, without a look at the installed packages."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._entry_points

    def __iter__(self) -> Iterator[EntryT]:
        return (self.get(name) for name in self.names())

    def get(self, name: str) -> EntryT:
        """Return the entry of a name, without importing its target unless an entry point declares it.

        Raises:
            RegistryError: the name is unknown (the message names the nearest one), two packages declare it, or its
                entry point cannot be imported.
        """
        points = self._entry_points.get(name, [])
        sources = [point.value for point in points] + (["remend"] if name in self._entries else [])
        if len(sources) > 1:
            raise RegistryError(
                f"the {self.kind} {name!r} is declared more than once ({', '.join(sources)}): uninstall a package"
            )
        if points:
            return self._from_entry_point(points[0])
        if name not in self._entries:
            raise RegistryError(f"there is no {self.kind} {name!r}; {nearest(name, self.names())}")
        return self._entries[name]

    def load(self, name: str) -> Any:
        """Return the target of an entry, imported if need be.

        Raises:
            RegistryError: as :meth:`get`, or the target cannot be imported.
        """
        target = self.get(name).target
        return self._import(name, target) if isinstance(target, str) else target

    def register(self, name: str, target: object, help: str = "", **details: Any) -> EntryT:  # noqa: A002
        """Add an entry for this process and return it.

        Args:
            name: a name that is still free.
            target: ``"module:attribute"``, which is imported when it is first loaded, or the object itself.
            help: one line about it.
            **details: the further fields of the entry's class.

        Raises:
            RegistryError: the name is taken, a field is unknown, or the text of a target is not ``"module:attribute"``.
        """
        known = [field.name for field in fields(self._entry_type)]
        for key in details:
            if key not in known:
                raise RegistryError(f"a {self.kind} has no field {key!r}; {nearest(key, known)}")
        return self._add(self._entry_type(name=name, target=target, help=help, **details))

    def unregister(self, name: str) -> None:
        """Remove an entry that :meth:`register` added, for example before a notebook's cell registers it again.

        Raises:
            RegistryError: nothing of that name was registered.
        """
        if name not in self._entries:
            raise RegistryError(f"no {self.kind} {name!r} was registered; {nearest(name, self._entries)}")
        del self._entries[name]

    def _add(self, entry: EntryT) -> EntryT:
        if entry.name in self._entries:
            raise RegistryError(f"there is a {self.kind} {entry.name!r} already: choose another name")
        if isinstance(entry.target, str) and not all(entry.target.partition(":")):
            raise RegistryError(
                f"the target of the {self.kind} {entry.name!r} should be 'module:attribute', not {entry.target!r}"
            )
        self._entries[entry.name] = entry
        return entry

    @cached_property
    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        # Reading the metadata of all installed packages takes some milliseconds, so it waits for the first look-up.
        points: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            points.setdefault(point.name, []).append(point)
        return points

    def _from_entry_point(self, point: EntryPoint) -> EntryT:
        target = self._import(point.name, point.value)
        if isinstance(target, self._entry_type):
            # The entry point's name is the one that users see in the list before anything is imported.
            return replace(target, name=point.name)
        first_line = (inspect.getdoc(target) or "").partition("\n")[0]
        return self._entry_type(name=point.name, target=target, help=first_line)

    def _import(self, name: str, target: str) -> Any:
        module, _, attribute = target.partition(":")
        try:
            value: Any = import_module(module)
            for part in attribute.split("."):
                value = getattr(value, part)
        except Exception as error:  # a module of another package may raise anything while it is imported
            reason = f"{type(error).__name__}: {error}"
            raise RegistryError(f"the {self.kind} {name!r} cannot be imported from {target} ({reason})") from error
        return value

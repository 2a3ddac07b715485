"""Names of the model as identifiers of another language."""

from __future__ import annotations

from collections.abc import Iterable

from tdxmig_model.errors import ModelError


class Names:
    """Gives each thing of the model one identifier, stable from run to run.

    `taken` are the words that the other language has for itself.
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._given: dict[tuple[str, str], str] = {}

    def give(self, kind: str, name: str) -> str:
        """The identifier of a thing; the same for the same kind and name."""
        key = kind, name
        if key not in self._given:
            plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
            if not plain:
                raise ModelError(f"a {kind} has the name {name!r}, which gives no identifier")
            if plain[0].isdigit() or plain[0] == "_":
                plain = f"{kind}_{plain}"
            while plain in self._taken:
                plain += "_"
            self._taken.add(plain)
            self._given[key] = plain
        return self._given[key]


def comment(text: str) -> str:
    """Text that cannot end a comment."""
    return text.replace("(*", "( *").replace("*)", "* )").replace("/*", "/ *").replace("*/", "* /")

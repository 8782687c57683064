"""What one user takes of a server that others use too, beside blocks: connections, and memory for plans. Pure.

A client that asks for too much is refused; what the others have is not touched. Numbers of one user are added up over
all of its connections, however many processes they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from connectors.errors import BadInputError

__all__ = ["MAX_USER_PLACES", "MAX_USER_TABLE_BYTES", "UserShare"]

MAX_USER_TABLE_BYTES = 2 << 30
"""Block tables of one user: some 60 million blocks of a few objects, or 7 million small objects."""

MAX_USER_PLACES = 1 << 21
"""Places ahead in all plans of one user; each takes some 400 bytes."""


@dataclass(slots=True)
class UserShare:
    """The connections of one user share it.

    Attributes:
        connections: Open now.
        places: Places ahead in the user's plans.
        table_bytes: Bytes of tables that are on their way, or in use by a plan; one that several plans use counts once.
    """

    connections: int = 0
    places: int = 0
    table_bytes: int = 0
    _users_of: dict[bytes, int] = field(default_factory=dict)

    def take_places(self, count: int) -> None:
        """Add places of a plan; a negative count gives back.

        Raises:
            BadInputError: They are too many, and none was added.
        """
        if count > 0 and self.places + count > MAX_USER_PLACES:
            raise BadInputError(f"the plans of one user look at most {MAX_USER_PLACES} blocks ahead, all together")
        self.places += count

    def take_bytes(self, size_bytes: int) -> None:
        """Add bytes of a table on its way; a negative number gives back.

        Raises:
            BadInputError: They are too many, and none was added.
        """
        if size_bytes > 0 and self.table_bytes + size_bytes > MAX_USER_TABLE_BYTES:
            raise BadInputError(f"the block tables of one user take at most {MAX_USER_TABLE_BYTES} bytes, all together")
        self.table_bytes += size_bytes

    def use_table(self, digest: bytes, size_bytes: int) -> None:
        """A plan begins over a table; errors as `take_bytes`."""
        if digest not in self._users_of:
            self.take_bytes(size_bytes)
        self._users_of[digest] = self._users_of.get(digest, 0) + 1

    def leave_table(self, digest: bytes, size_bytes: int) -> None:
        """A plan over a table has ended."""
        self._users_of[digest] -= 1
        if not self._users_of[digest]:
            del self._users_of[digest]
            self.take_bytes(-size_bytes)

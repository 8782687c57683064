"""The client's end of a plan: a connection of its own on which a reader tells its future."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cache.block_table import BlockTable, TablePage
from cache.connection import Connection
from cache.frames import (
    MAX_PLAN_BLOCKS,
    MAX_REQUEST_BYTES,
    AdvancePlan,
    Done,
    ExtendPlan,
    Failed,
    OpenPlan,
    PlanOpened,
    ReplacePlan,
    Reply,
    Request,
    encode,
    error_of,
)
from connectors.errors import BadInputError, DataError, ErrorKind

__all__ = ["PlanLink"]

_R = TypeVar("_R", bound=Reply)


class PlanLink:
    """See `cache.reader.PlanHandle`. Belongs to one thread; a forked child must not use it.

    Args:
        connection: Owned by the link from here on, also when this raises.
        table: Sent now, unless the server has it.

    Raises:
        DataError: The server went away, or cannot take the plan.
    """

    def __init__(self, connection: Connection, table: BlockTable) -> None:
        self._connection = connection
        try:
            if not self._ask(OpenPlan(table.digest, len(table)), PlanOpened).table_known:
                for page in table.pages:
                    self._send(page)
        except BaseException:
            self.close()
            raise

    def extend(self, blocks: npt.NDArray[np.integer[Any]]) -> None:
        """Append block numbers, in the order in which they will be read."""
        for begin in range(0, len(blocks), MAX_PLAN_BLOCKS):
            self._ask(ExtendPlan(blocks[begin : begin + MAX_PLAN_BLOCKS].astype("<i4").tobytes()), Done)

    def advance(self, position: int) -> None:
        """Say that all places before `position` are done with."""
        self._ask(AdvancePlan(position), Done)

    def replace(self) -> None:
        """Take back all that lies ahead of the last position; `extend` goes on from there."""
        self._ask(ReplacePlan(), Done)

    def close(self) -> None:
        """End the plan; what only it wanted is no longer fetched."""
        self._connection.close()

    def _send(self, page: TablePage) -> None:
        if len(encode(page)) > MAX_REQUEST_BYTES:
            raise BadInputError("the names of these objects are too long for a plan")
        self._ask(page, Done)

    def _ask(self, request: Request, expected: type[_R]) -> _R:
        reply, _ = self._connection.ask_once(request)
        if isinstance(reply, Failed):
            raise error_of(reply)
        if not isinstance(reply, expected):
            raise DataError(f"the cache server answered a plan with {type(reply).__name__}", kind=ErrorKind.PROTOCOL)
        return reply

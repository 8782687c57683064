"""The plan of one connection: what a client says about its future, told to the prefetcher.

A connection has at most one plan, which ends with it, however the client died.
"""

from __future__ import annotations

from typing import TypeAlias

from cache.block_table import BlockTable
from cache.frames import AdvancePlan, Done, ExtendPlan, OpenPlan, PlanOpened, ReplacePlan, TablePage
from cache.prefetch import Prefetcher
from connectors.errors import BadInputError

__all__ = ["PlanRequest", "ReaderPlan"]

PlanRequest: TypeAlias = OpenPlan | TablePage | ExtendPlan | AdvancePlan | ReplacePlan


class ReaderPlan:
    """Belongs to one connection.

    Args:
        prefetcher: Shared by all.
    """

    def __init__(self, prefetcher: Prefetcher) -> None:
        self._prefetcher = prefetcher
        self._number: int | None = None
        # A table on its way: its digest, the blocks still to come, and the pages that came.
        self._digest = b""
        self._missing = 0
        self._pages: list[TablePage] = []

    def answer(self, request: PlanRequest) -> PlanOpened | Done:
        """Do what a request says.

        Raises:
            BadInputError: It cannot be done, or not now.
        """
        match request:
            case OpenPlan():
                return PlanOpened(self._open(request))
            case TablePage():
                self._take_page(request)
            case ExtendPlan():
                self._prefetcher.extend(self._plan(), request.blocks)
            case AdvancePlan():
                self._prefetcher.advance(self._plan(), request.position)
            case ReplacePlan():
                self._prefetcher.replace(self._plan())
        return Done()

    def close(self) -> None:
        """End the plan, if there is one."""
        if self._number is not None:
            self._prefetcher.close(self._number)
            self._number = None

    def _open(self, request: OpenPlan) -> bool:
        if self._number is not None:
            raise BadInputError("this connection has a plan already")
        self._digest, self._missing, self._pages = request.table, request.num_blocks, []
        if not self._prefetcher.knows(request.table):
            return False
        self._number = self._prefetcher.open(request.table)
        return True

    def _take_page(self, page: TablePage) -> None:
        if self._number is not None or page.num_blocks > self._missing:
            raise BadInputError("a page of a block table came that nobody waits for")
        page.check()
        self._pages.append(page)
        self._missing -= page.num_blocks
        if not self._missing:
            pages, self._pages = self._pages, []
            self._number = self._prefetcher.open(self._digest, BlockTable(pages))

    def _plan(self) -> int:
        if self._number is None:
            raise BadInputError("a plan begins with its block table")
        return self._number

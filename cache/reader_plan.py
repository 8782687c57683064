"""The plan of one connection: what a client says about its future, told to the prefetcher.

A connection has at most one plan, which ends with it, however the client died.

A client may lie. What a table names is read with the daemon's credentials, so a user must be allowed to read all of it;
a table that another user sent is therefore not simply lent to one for whom there are rules. A table has to have the
digest under which it was announced, or others would plan with it who trust that name.
"""

from __future__ import annotations

from typing import TypeAlias

from cache.block_table import BlockTable, TableDigest, TablePage
from cache.frames import AdvancePlan, Done, ExtendPlan, OpenPlan, PlanOpened, ReplacePlan
from cache.prefetch import Prefetcher
from cache.rights import Rights
from cache.share import UserShare
from connectors.errors import BadInputError

__all__ = ["PlanRequest", "ReaderPlan"]

PlanRequest: TypeAlias = OpenPlan | TablePage | ExtendPlan | AdvancePlan | ReplacePlan


class ReaderPlan:
    """Belongs to one connection.

    Args:
        prefetcher: Shared by all.
        rights: What the user at the other end may read.
        share: What that user takes already.

    Attributes:
        job: For which the plan is, under whose quota falls what is fetched for it.
    """

    def __init__(self, prefetcher: Prefetcher, rights: Rights, share: UserShare) -> None:
        self._prefetcher = prefetcher
        self._rights = rights
        self._share = share
        self.job = ""
        self._number: int | None = None
        self._digest = b""
        # A table on its way: the blocks still to come, the pages that came, and their digest.
        self._missing = 0
        self._pages: list[TablePage] = []
        self._arrived = TableDigest()
        # A table in use, and the places of the plan over it.
        self._table_bytes = 0
        self._position = self._end = 0

    def answer(self, request: PlanRequest) -> PlanOpened | Done:
        """Do what a request says.

        Raises:
            BadInputError: It cannot be done, or not now.
            PermissionDeniedError: The user may not read all that the table names.
        """
        match request:
            case OpenPlan():
                return PlanOpened(self._open(request))
            case TablePage():
                self._take_page(request)
            case ExtendPlan():
                self._extend(request.blocks)
            case AdvancePlan():
                self._prefetcher.advance(self._plan(), request.position)
                self._moved(max(request.position, self._position), self._end)
            case ReplacePlan():
                self._prefetcher.replace(self._plan())
                self._moved(self._position, self._position)
        return Done()

    def close(self) -> None:
        """End the plan, if there is one."""
        self._forget_pages()
        if self._number is not None:
            self._prefetcher.close(self._number)
            self._number = None
            self._share.leave_table(self._digest, self._table_bytes)
            self._moved(0, 0)

    def _open(self, request: OpenPlan) -> bool:
        if self._number is not None:
            raise BadInputError("this connection has a plan already")
        self._forget_pages()
        self._digest, self._missing = request.table, request.num_blocks
        table = None if self._rights.limited else self._prefetcher.table(request.table)
        if table is None:
            return False
        self._begin(table)
        return True

    def _take_page(self, page: TablePage) -> None:
        if self._number is not None or page.num_blocks > self._missing:
            raise BadInputError("a page of a block table came that nobody waits for")
        page.check()
        self._rights.check(page.uris)
        self._share.take_bytes(page.size_bytes)
        self._pages.append(page)
        self._arrived.add(page)
        self._missing -= page.num_blocks
        if not self._missing:
            pages, digest = self._pages, self._arrived.value()
            self._forget_pages()
            if digest != self._digest:
                raise BadInputError("a block table came that is not the one that was announced")
            self._begin(BlockTable(pages))

    def _begin(self, table: BlockTable) -> None:
        self._share.use_table(self._digest, table.size_bytes)
        try:
            self._number = self._prefetcher.open(self._digest, table, job=self.job)
        except BaseException:
            self._share.leave_table(self._digest, table.size_bytes)
            raise
        self._table_bytes = table.size_bytes

    def _forget_pages(self) -> None:
        for page in self._pages:
            self._share.take_bytes(-page.size_bytes)
        self._pages, self._arrived, self._missing = [], TableDigest(), 0

    def _extend(self, blocks: bytes) -> None:
        number, count = self._plan(), len(blocks) // 4
        self._share.take_places(count)
        try:
            self._prefetcher.extend(number, blocks)
        except BaseException:
            self._share.take_places(-count)
            raise
        self._end += count

    def _moved(self, position: int, end: int) -> None:
        self._share.take_places((end - position) - (self._end - self._position))
        self._position, self._end = position, end

    def _plan(self) -> int:
        if self._number is None:
            raise BadInputError("a plan begins with its block table")
        return self._number

"""What is under way stays within the limit, in order of arrival, and nobody is forgotten."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from cache.budget import Budget, Errand

STEPS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.booleans()), min_size=1, max_size=25)


@given(STEPS)
def test_limits_hold_and_all_get_their_turn_whoever_gives_up(steps: list[tuple[int, int, bool]]) -> None:
    async def scenario() -> None:
        budget = Budget(max_bytes=10, max_requests=3)
        running: list[int] = []
        started: list[int] = []

        async def work(number: int, size_bytes: int, yields: int) -> None:
            async with budget.spend(size_bytes):
                started.append(number)
                running.append(size_bytes)
                assert len(running) == 1 or (sum(running) <= 10 and len(running) <= 3)
                try:
                    for _ in range(yields):
                        await asyncio.sleep(0)
                finally:
                    running.remove(size_bytes)

        tasks = [asyncio.create_task(work(n, size, yields)) for n, (size, yields, _) in enumerate(steps)]
        await asyncio.sleep(0)
        for task, (_, _, gives_up) in zip(tasks, steps, strict=True):
            if gives_up:
                task.cancel()
        patient = [task for task, (_, _, gives_up) in zip(tasks, steps, strict=True) if not gives_up]
        await asyncio.gather(*patient)
        await asyncio.wait(tasks)
        assert started == sorted(started)
        async with budget.spend(10):
            pass

    asyncio.run(scenario())


async def test_what_exceeds_the_limit_alone_goes_alone() -> None:
    budget = Budget(max_bytes=10, max_requests=3)
    async with budget.spend(50):
        second = asyncio.create_task(_spend(budget, 1))
        await asyncio.sleep(0)
        assert not second.done()
    await second


async def test_a_turn_given_to_one_who_just_gave_up_goes_on() -> None:
    budget = Budget(max_bytes=10, max_requests=1)
    async with budget.spend(1):
        first, second = (asyncio.create_task(_spend(budget, 1)) for _ in range(2))
        await asyncio.sleep(0)
    # The turn is the first one's already, but it has not run yet.
    first.cancel()
    await second
    assert first.cancelled() or first.cancelling()


async def _spend(budget: Budget, size_bytes: int) -> None:
    async with budget.spend(size_bytes):
        pass


async def test_who_is_waited_for_goes_before_work_ahead_of_time_and_finds_room() -> None:
    budget = Budget(max_bytes=100, max_requests=4)
    order: list[str] = []
    gate = asyncio.Event()

    async def work(name: str, errand: Errand) -> None:
        async with budget.spend(1, errand):
            order.append(name)
            await gate.wait()

    later = [Errand(awaited=False) for _ in range(5)]
    tasks = [asyncio.create_task(work(f"ahead {n}", errand)) for n, errand in enumerate(later)]
    await asyncio.sleep(0)
    assert order == ["ahead 0", "ahead 1", "ahead 2"], "a quarter stays free"
    tasks += [asyncio.create_task(work(name, Errand())) for name in ("demand 0", "demand 1")]
    await asyncio.sleep(0)
    assert order[3:] == ["demand 0"]
    budget.hurry(later[4])
    budget.hurry(later[4])
    gate.set()
    await asyncio.gather(*tasks)
    assert order[4:] == ["demand 1", "ahead 4", "ahead 3"]


async def test_nothing_is_begun_ahead_while_much_is_waited_for() -> None:
    budget = Budget(max_bytes=1 << 30, max_requests=100)
    order: list[str] = []
    gates = {name: asyncio.Event() for name in ("early", "demand", "later")}

    async def work(name: str, errand: Errand) -> None:
        async with budget.spend(20 << 20, errand):
            order.append(name)
            await gates[name].wait()

    early = Errand(awaited=False)
    tasks = [asyncio.create_task(work("early", early)), asyncio.create_task(work("demand", Errand()))]
    await asyncio.sleep(0)
    budget.hurry(early)  # with it, 40 MiB are waited for
    tasks.append(asyncio.create_task(work("later", Errand(awaited=False))))
    await asyncio.sleep(0)
    assert order == ["early", "demand"]
    gates["early"].set()
    await tasks[0]
    await asyncio.sleep(0)
    assert order == ["early", "demand", "later"]
    for gate in gates.values():
        gate.set()
    await asyncio.gather(*tasks)
    assert early.held_bytes == 0


async def test_work_that_somebody_came_to_wait_for_counts_as_waited_for() -> None:
    budget = Budget(max_bytes=1 << 30, max_requests=100)
    await _spend(budget, 200 << 20)  # so that much may be under way ahead of time
    gate = asyncio.Event()
    order: list[str] = []

    async def work(name: str, size_bytes: int, errand: Errand) -> None:
        async with budget.spend(size_bytes, errand):
            order.append(name)
            await gate.wait()

    hurried = Errand(awaited=False)
    tasks = [asyncio.create_task(work("hurried", 32 << 20, hurried))]
    await asyncio.sleep(0)
    budget.hurry(hurried)
    tasks += [asyncio.create_task(work("ahead", 1, Errand(awaited=False)))]
    await asyncio.sleep(0)
    assert order == ["hurried"]
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["hurried", "ahead"]


async def test_work_ahead_of_time_starts_slowly_and_doubles() -> None:
    budget = Budget(max_bytes=1 << 30, max_requests=100)
    running: list[int] = []
    gates = [asyncio.Event() for _ in range(20)]

    async def work(number: int) -> None:
        async with budget.spend(8 << 20, Errand(awaited=False)):
            running.append(number)
            await gates[number].wait()

    tasks = [asyncio.create_task(work(number)) for number in range(20)]
    await asyncio.sleep(0)
    assert len(running) == 4
    for done in range(4):
        gates[done].set()
    await asyncio.gather(*tasks[:4])
    await asyncio.sleep(0)
    assert len(running) == 4 + 8
    for gate in gates:
        gate.set()
    await asyncio.gather(*tasks)


async def test_a_limit_that_is_lowered_holds_for_what_comes() -> None:
    budget = Budget(max_bytes=100, max_requests=4)
    async with budget.spend(1), budget.spend(1):
        budget.max_requests = 2
        third = asyncio.create_task(_spend(budget, 1))
        await asyncio.sleep(0)
        assert not third.done()
    await third

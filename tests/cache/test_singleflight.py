"""One piece of work per key."""

import asyncio

from cache.singleflight import SingleFlight


async def test_all_who_come_while_it_flies_get_one_value() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    assert flights.join("a") is None
    first = flights.begin("a")
    others = [flights.join("a") for _ in range(3)]
    flights.land("a", 7)
    assert [flight.result() for flight in (first, *others)] == [7] * 4
    assert flights.joined == 3


async def test_a_landed_flight_is_forgotten() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    flights.begin("a")
    flights.land("a", 7)
    assert flights.join("a") is None
    assert flights.joined == 0


async def test_a_withdrawn_flight_is_nobodys() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    flights.begin("a")
    flights.withdraw("a")
    assert flights.join("a") is None


async def test_a_waiter_that_gives_up_takes_nothing_from_the_others() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    flight = flights.begin("a")
    waiters = [asyncio.create_task(asyncio.wait({flight})) for _ in range(2)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    await asyncio.wait({waiters[0]})
    flights.land("a", 7)
    await waiters[1]
    assert waiters[0].cancelled()
    assert flight.result() == 7

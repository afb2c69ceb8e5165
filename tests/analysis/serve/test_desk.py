"""The bounded queue before one thread."""

import asyncio
import threading

import pytest

from fpn_d2.analysis.serve.desk import Busy, Desk, Late


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 60))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_places_are_bounded_and_work_is_done_in_order():
    async def scenario():
        desk, go, order = Desk(places=3, timeout=60), threading.Event(), []

        async def one(number):
            def call():
                go.wait()
                order.append(number)
                return {"number": number}

            with desk.place() as place:
                return await place.work(call, asyncio.get_running_loop().create_future())

        tasks = [asyncio.ensure_future(one(number)) for number in range(3)]
        await until(lambda: desk.taken == 3)
        with pytest.raises(Busy) as caught:
            await one(3)
        assert caught.value.seconds == 3 and desk.taken == 3  # three at a second each
        go.set()
        assert [answer["number"] for answer in await asyncio.gather(*tasks)] == [0, 1, 2] == order
        assert desk.taken == 0 and desk.seconds < 1
        desk.close()

    run(scenario)


def test_late_work_keeps_its_place_until_it_has_ended():
    async def scenario():
        desk, go, begun = Desk(places=2, timeout=0.05), threading.Event(), threading.Event()

        async def ask(call):
            with desk.place() as place:
                return await place.work(call, asyncio.get_running_loop().create_future())

        def slow():
            begun.set()
            go.wait()
            return {}

        never = []
        first = asyncio.ensure_future(ask(slow))
        await until(begun.is_set)
        with pytest.raises(Late):
            await ask(lambda: never.append(1))
        with pytest.raises(Late):
            await first
        assert desk.taken == 1  # the second had not begun, and never will
        go.set()
        await until(lambda: desk.taken == 0)
        assert await ask(lambda: {"a": 1}) == {"a": 1} and not never
        desk.close()

    run(scenario)


def test_who_has_gone_is_not_answered_and_errors_free_the_place():
    async def scenario():
        desk, go, begun, never = Desk(places=2, timeout=60), threading.Event(), threading.Event(), []
        gone = asyncio.get_running_loop().create_future()

        async def ask(call, gone):
            with desk.place() as place:
                return await place.work(call, gone)

        first = asyncio.ensure_future(ask(lambda: begun.set() or go.wait() or {}, asyncio.Future()))
        await until(begun.is_set)
        second = asyncio.ensure_future(ask(lambda: never.append(1), gone))
        await until(lambda: desk.taken == 2)
        gone.set_result(None)
        assert await second is None and desk.taken == 1
        go.set()
        await first
        with pytest.raises(ZeroDivisionError):
            await ask(lambda: 1 / 0, asyncio.Future())
        assert desk.taken == 0 and not never
        desk.close()

    run(scenario)

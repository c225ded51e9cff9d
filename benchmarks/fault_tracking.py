"""Faults of the MLflow server: down, slow, answering 500, its answers lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from disturbed import Bench, Damage, Place
from unreliable import Proxy, Server


def _tracked(bench: Bench, times: int, kind: str, disturb: Callable[[Place, Any, Server, Proxy], None]) -> Damage:
    damage = Damage(after=0.0)
    for _ in range(times):
        folder = bench.folder / f"{kind}-server-{bench.random.randint(0, 1 << 30)}"
        folder.mkdir()
        server = Server(folder)
        proxy = Proxy(server.port)
        try:
            place = bench.place(kind, store=server.store)
            disturb(place, place.start, server, proxy)
            damage.after = (damage.after or 0.0) + place.after - bench.after
            proxy.mode = "ok"
            server.kill()
            server.start()
            place.run("sync", str(place.study), "--tracking", proxy.uri)
            said = place.run("sync", str(place.study), "--tracking", proxy.uri)
            if "; 0 were written now" not in said:
                raise RuntimeError(f"a second sync wrote again: {said}")
            bench.compare(place, damage, server.store)
        finally:
            server.kill()
            proxy.close()
    return damage


def _check_names_sync(said: str) -> None:
    if "pagating sync" not in said:
        raise RuntimeError(f"the output does not mention 'pagating sync': {said[-1000:]}")


def mlflow_down_at_start(bench: Bench, times: int) -> Damage:
    """The MLflow server down from the start to the end."""

    def disturb(place: Place, start: Any, server: Server, proxy: Proxy) -> None:
        _check_names_sync(place.wait(start(proxy.uri)))

    return _tracked(bench, times, "mlflow-start", disturb)


def _kill_and_restart(after: int, back: int | None) -> Callable[[Place, Any, Server, Proxy], None]:
    """Make a fault: kill the server after `after` cells, and start it again after `back` cells, or never if None."""

    def disturb(place: Place, start: Any, server: Server, proxy: Proxy) -> None:
        server.start()
        running = start(proxy.uri)
        place.until(running, after)
        server.kill()
        if back is None:
            return _check_names_sync(place.wait(running))
        place.until(running, back)
        server.start()
        place.wait(running)

    return disturb


def mlflow_down_between(bench: Bench, times: int) -> Damage:
    """The MLflow server killed in the middle, and back before the end."""
    return _tracked(bench, times, "mlflow-middle", _kill_and_restart(4, 10))


def mlflow_down_at_end(bench: Bench, times: int) -> Damage:
    """The MLflow server killed in the middle, for good."""
    return _tracked(bench, times, "mlflow-end", _kill_and_restart(8, None))


def _in_mode(mode: str) -> Callable[[Place, Any, Server, Proxy], None]:
    def disturb(place: Place, start: Any, server: Server, proxy: Proxy) -> None:
        server.start()
        running = start(proxy.uri)
        place.until(running, 3)
        proxy.mode = mode
        place.wait(running)

    return disturb


def mlflow_slow(bench: Bench, times: int) -> Damage:
    """The MLflow server slow: one second per answer."""
    return _tracked(bench, times, "mlflow-slow", _in_mode("slow"))


def mlflow_500(bench: Bench, times: int) -> Damage:
    """The MLflow server answering 500."""
    return _tracked(bench, times, "mlflow-500", _in_mode("error"))


def mlflow_lost(bench: Bench, times: int) -> Damage:
    """The MLflow server carrying out each request but losing its answer (504)."""
    return _tracked(bench, times, "mlflow-lost", _in_mode("lost"))

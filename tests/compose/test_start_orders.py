"""Whatever starts first, the mesh finds itself: no container waits for another by name."""

from __future__ import annotations

import random
import time

from tests.compose.conftest import new_stack
from tests.compose.stack import MESH, generate, ready, wait_until


def test_any_order_of_starting_ends_in_a_mesh(order: int, text: str) -> None:
    chance = random.Random(order)
    services = chance.sample(("certs", *MESH), len(MESH) + 1)
    with new_stack(f"order-{order}") as stack:
        stack.compose("up", "--no-start", *services)
        for service in services:
            stack.docker("start", stack.container(service))
            time.sleep(chance.uniform(0, 2))  # part of what is tried, and nothing is waited for by it
        wait_until(lambda: ready(stack.url()), "the router service is ready")
        assert generate(stack.url()) == text

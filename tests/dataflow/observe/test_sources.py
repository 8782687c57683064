from itertools import permutations

import pytest

from dataflow.observe.sources import find_farthest


@pytest.mark.parametrize(
    ("sources", "farthest"),
    [(("ram",), "ram"), (("ring", "disk", "ram"), "disk"), (("ram", "disk", "origin"), "origin")],
)
def test_a_read_waits_for_what_is_farthest(sources, farthest):
    assert {find_farthest(order) for order in permutations(sources)} == {farthest}

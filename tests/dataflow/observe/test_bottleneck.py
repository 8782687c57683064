import re

import pytest

from dataflow.observe import name_bottleneck


@pytest.mark.parametrize(
    ("seconds", "counts", "words"),
    [
        ({}, {}, "nothing: no batch"),
        ({"wait": 1, "model": 99, "decode": 500}, {}, "the model: it waits for data 1%"),
        ({"wait": 50, "model": 50}, {}, "for workers that have not made a batch yet"),
        ({"wait": 50, "model": 50, "decode": 9, "fetch": 1}, {}, "decoding: .* waits 50% of the time, decode is 90%"),
        ({"wait": 50, "model": 0, "collate": 2, "fetch": 1}, {}, "making batches of samples"),
        ({"wait": 50, "model": 0, "transfer": 2, "fetch": 1}, {}, "copying to the device"),
        ({"wait": 50, "model": 0, "tokenise": 2, "fetch": 1}, {}, "the stage 'tokenise'"),
        ({"wait": 9, "model": 0, "fetch": 1}, {}, "reading samples"),
        ({"wait": 9, "model": 0, "fetch": 1, "fetch.ram": 9}, {"bytes.ram": 3}, "blocks that are here, from 'ram'"),
        ({"wait": 9, "model": 0, "fetch.disk": 9}, {"bytes.disk": 3}, "from the tier 'disk'"),
        (
            {"wait": 50, "model": 0, "fetch.origin": 3, "fetch.ram": 1, "decode": 3.5},
            {"bytes.origin": 1, "bytes.ram": 9},
            r"the origin \(75% of the time of reading, 10% of the bytes\).* fetch is 53% of the work",
        ),
    ],
)
def test_the_slowest_stage_of_a_late_loop_is_named(seconds, counts, words):
    assert re.search(words, name_bottleneck(seconds, counts))

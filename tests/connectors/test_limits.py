import pytest

from connectors import BadInputError
from connectors.limits import RequestLimits


@pytest.mark.parametrize("name", ["connect_timeout_s", "read_timeout_s", "request_timeout_s", "retry_timeout_s"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_that_bounds_nothing_is_refused_by_name(name, value):
    with pytest.raises(BadInputError, match=f"{name} .* {value}"):
        RequestLimits(**{name: value})


def test_no_retries_at_all_are_allowed():
    assert RequestLimits(max_retries=0).max_retries == 0
    with pytest.raises(BadInputError, match="max_retries"):
        RequestLimits(max_retries=-1)

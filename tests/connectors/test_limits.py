import math
from dataclasses import fields

import pytest

from connectors import BadInputError
from connectors.limits import FIRST_ANSWER_VARIABLE, RequestLimits, limits_from_environment


@pytest.mark.parametrize("name", [field.name for field in fields(RequestLimits) if field.name != "max_retries"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_limit_that_bounds_nothing_is_refused_by_name(name, value):
    with pytest.raises(BadInputError, match=f"{name} .* {value}"):
        RequestLimits(**{name: value})


def test_no_retries_at_all_are_allowed():
    assert RequestLimits(max_retries=0).max_retries == 0
    with pytest.raises(BadInputError, match="max_retries"):
        RequestLimits(max_retries=-1)


def test_the_environment_says_how_long_a_first_answer_may_take():
    assert limits_from_environment({FIRST_ANSWER_VARIABLE: "90"}) == RequestLimits(first_answer_s=90)
    assert limits_from_environment({FIRST_ANSWER_VARIABLE: ""}) == limits_from_environment({}) == RequestLimits()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_first_answer_at_no_time_is_refused_by_the_variable(text):
    with pytest.raises(BadInputError, match=FIRST_ANSWER_VARIABLE):
        limits_from_environment({FIRST_ANSWER_VARIABLE: text})

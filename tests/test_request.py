"""Sampling parameters: what cannot be served is named, whatever type it has."""

from __future__ import annotations

from typing import Any

import pytest

from jserve.errors import InvalidRequest
from jserve.request import SamplingParams

VOCAB = 100

WRONG = [
    ({"stop": None}, "stop is None"),
    ({"stop": 5}, "stop is 5"),
    ({"stop": [1]}, "stop is .*expected `str`, got `int`"),
    ({"stop_token_ids": None}, "stop_token_ids is None"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids is .*expected `int`"),
    ({"logit_bias": None}, "logit_bias is None"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias is .*'5'"),
    ({"logit_bias": {5: "1"}}, "logit_bias is .*expected `float`"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"temperature": 1e-40}, "temperature is 1e-40: use 0 .greedy., or a number from 0.001"),
    ({"temperature": -1e-40}, "temperature is -1e-40"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40: use a number from 0.01"),
    ({"top_p": 0.0}, "top_p is 0.0: use a number above 0"),
    ({"n": 1.5}, "n is 1.5"),
    ({"n": True}, "n is True"),
    ({"seed": 10**30}, "seed is 1000"),
    ({"max_tokens": "9"}, "max_tokens is '9'"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_a_wrong_value_is_named_whether_it_comes_by_keyword_or_by_hand(given: dict[str, Any], said: str) -> None:
    for make in (lambda: SamplingParams.of(given), lambda: SamplingParams(**given)):
        with pytest.raises(InvalidRequest, match=said):
            make().check(VOCAB)


def test_whole_numbers_lists_and_a_single_stop_string_will_do() -> None:
    given = SamplingParams.of({"temperature": 1, "stop": "end", "stop_token_ids": [3], "logit_bias": {5: 2}})
    given.check(VOCAB)
    assert (given.temperature, given.stop, given.stop_token_ids) == (1.0, ("end",), (3,))
    assert SamplingParams.of({"temperature": 0}) == SamplingParams()

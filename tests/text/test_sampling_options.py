"""SamplingParams and its bias refuse what has no meaning."""

import math

import pytest

from mpillama.errors import UserError
from mpillama.text.sampler import Sampler
from mpillama.text.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {1: math.inf}),
        ("seed", -1),
    ],
)
def test_option_out_of_range(name, value):
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("token", [-1, 8])
def test_bias_outside_the_vocabulary(token):
    with pytest.raises(UserError, match=f"token {token}"):
        Sampler(SamplingParams(logit_bias={token: 1.0}), 8, [])

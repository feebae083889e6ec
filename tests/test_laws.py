"""Every law of means, collectors and accumulation."""

import pytest
from laws import LAWS

import jaxlosses as jl


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law):
    law(jl)


def test_every_law_is_found():
    assert len(LAWS) >= 10

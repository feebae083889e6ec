"""Every property on every public loss: a new loss needs no edit here."""

import pytest
from arguments import cases
from properties import PROPERTIES

import jaxlosses as jl

CASES = cases(jl)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", CASES)
def test_property(name, check):
    check(CASES[name])


def test_every_loss_is_found():
    assert len(CASES) >= 10
    assert set(CASES) == {name for name in vars(jl) if name.islower() and name[0] != "_"} - {
        "weighted"
    }
    assert len(PROPERTIES) >= 20

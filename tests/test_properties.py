"""Every property on every public loss: a new loss needs no edit here."""

import inspect

import pytest
from arguments import cases, lifted_cases
from properties import PROPERTIES

import jaxlosses as jl

PUBLIC = cases(jl)
CASES = PUBLIC | lifted_cases(jl)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", CASES)
def test_property(name, check):
    check(CASES[name])


def test_every_loss_is_found():
    assert len(PUBLIC) >= 10
    functions = {name: value for name, value in vars(jl).items() if inspect.isroutine(value)}
    arguments = {name: set(inspect.signature(f).parameters) for name, f in functions.items()}
    assert set(PUBLIC) == {n for n, found in arguments.items() if {"weights", "reduction"} <= found}
    assert len(PROPERTIES) >= 20

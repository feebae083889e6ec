"""The new loss in CONTRIBUTING.md is one of the suite's, without an edit."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arguments import cases
from properties import PROPERTIES

from jaxlosses import _kernel, _typing

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
if not PAGE.exists():
    pytest.skip("CONTRIBUTING.md is not here, only the tests", allow_module_level=True)


@pytest.fixture
def jax_defaults():
    """Not here: the properties are checked as everywhere else, in strict JAX."""


@pytest.fixture(scope="module")
def case():
    (code,) = re.findall(r"^```python\n(.+?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 15
    names = {**vars(_typing), "reduce_losses": _kernel.reduce_losses, "jnp": jnp}
    exec(code, names)
    loss = names["log_cosh"]
    x = jnp.asarray(np.linspace(-3, 3, 7, dtype=np.float32))
    np.testing.assert_allclose(
        loss(x, jnp.zeros(7), reduction="none"), np.log(np.cosh(x)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss))(x, jnp.zeros(7)), np.tanh(x), rtol=1e-5, atol=1e-6
    )
    (case,) = cases(SimpleNamespace(log_cosh=loss)).values()
    return case


CHECKED = (  # Those that compile little; the suite has all of them for the public losses.
    "finite_differences_agree",
    "reductions_agree",
    "shapes_must_match",
    "weights_align_from_the_left",
    "what_is_absent_touches_nothing",
    "wrong_arguments_are_named",
)


@pytest.mark.parametrize("name", CHECKED)
def test_property(case, name):
    {check.__name__: check for check in PROPERTIES}[name](case)

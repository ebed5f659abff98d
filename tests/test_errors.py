import pytest

from emoe_jax.errors import ConfigError, one_line, require


def test_errors_are_printed_in_one_line():
    assert one_line(ConfigError("wrong\n  here")) == "wrong here"
    assert one_line(OSError()) == "OSError"


def test_of_a_missing_package_it_is_said_how_to_get_it():
    require("json")
    with pytest.raises(ModuleNotFoundError) as caught:
        require("no_such_package")
    assert one_line(caught.value) == "the package no_such_package is missing: pip install 'emoe-jax[test]'"

"""The program's entrance: commands that cannot be imported."""

import sys

import pytest

from mpillama.__main__ import import_command
from mpillama.errors import UserError


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A package is not installed."""
    monkeypatch.delitem(sys.modules, "mpillama.cli.client", raising=False)
    monkeypatch.setitem(sys.modules, request.param, None)


@pytest.mark.parametrize("without", ["httpx"], indirect=True)
@pytest.mark.usefixtures("without")
def test_an_optional_package_that_is_missing_is_named_with_its_remedy() -> None:
    with pytest.raises(UserError, match=r"client needs the package httpx: pip install 'mpillama\[serve\]'\."):
        import_command("client")


@pytest.mark.parametrize("without", ["mpillama.redaction"], indirect=True)
@pytest.mark.usefixtures("without")
def test_a_module_of_the_package_that_is_missing_is_a_failure() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"mpillama\.redaction"):
        import_command("client")

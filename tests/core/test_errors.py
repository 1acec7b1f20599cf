from __future__ import annotations

import pytest

from starkv_core.errors import RunFailure, StarkvError, UserError


def test_one_offender_stays_on_one_line() -> None:
    assert str(UserError.many("r.yaml: 1 fault", ["steps: got -1"])) == (
        "r.yaml: 1 fault: steps: got -1"
    )


def test_several_offenders_get_a_line_each() -> None:
    error = UserError.many("r.yaml", (f"fault {i}" for i in range(3)))
    assert str(error).splitlines() == ["r.yaml:", "  fault 0", "  fault 1", "  fault 2"]


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (RunFailure, 1)])
def test_exit_codes_and_type(kind: type[StarkvError], code: int) -> None:
    error = kind.many("title", ["a"])
    assert type(error) is kind
    assert error.exit_code == code

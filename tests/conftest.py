"""Over the whole run: no software TDX module encrypts twice with one (key, IV) pair."""

import pytest
from iv_record import RECORD

pytest.register_assert_rewrite("error_rows", "soft_pair", "soft_calls")
RECORD.install()


@pytest.fixture(autouse=True)
def no_iv_is_used_twice():
    RECORD.take_repeated()
    yield
    repeated = RECORD.take_repeated()
    assert not repeated, f"{len(repeated)} (key, IV) pairs encrypted more than once"


def pytest_terminal_summary(terminalreporter):
    if RECORD.total:
        terminalreporter.write_line(f"{RECORD.total} encryptions watched for repeated (key, IV)")

"""Over the whole run: no software TDX module encrypts twice with one (key, IV) pair."""

import signal

import pytest
from iv_record import CHILDREN, RECORD

pytest.register_assert_rewrite("error_rows", "soft_pair", "soft_calls", "soft_migration")
RECORD.install()
# Whoever starts a program in the background may have it ignore these; the programs that tests start
# must not inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def processes_report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        CHILDREN.watch(tmp_path_factory.mktemp("iv_reports"), monkeypatch)
        yield


@pytest.fixture(autouse=True)
def no_iv_is_used_twice():
    RECORD.take_repeated()
    yield
    repeated = RECORD.take_repeated()
    assert not repeated, f"{len(repeated)} (key, IV) pairs encrypted more than once"
    CHILDREN.judge()


def pytest_terminal_summary(terminalreporter):
    if RECORD.total:
        terminalreporter.write_line(f"{RECORD.total} encryptions watched for repeated (key, IV)")

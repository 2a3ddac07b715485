"""Over the whole run: no software TDX module encrypts twice with one (key, IV) pair."""

import signal

import pytest
from iv_record import CHILDREN, RECORD

pytest.register_assert_rewrite(
    "error_rows", "soft_pair", "soft_calls", "soft_migration", "ends", "kvm_caller"
)
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


ENDS = [
    ("soft", "soft"),
    ("Gen-1a", "Gen-1a"),
    ("Gen-1b", "Gen-1b"),
    ("Gen-1a", "soft"),
    ("soft", "Gen-1b"),
]


@pytest.fixture(params=ENDS, ids="-to-".join)
def ends(request):
    """A source and a destination, each over the module itself or over KVM's interface to it."""
    from ends import Ends

    made = Ends(*request.param)
    yield made
    made.close()


@pytest.fixture
def callers():
    """Makes pairs of TDs without streams, behind KVM's interface of a dialect."""
    from kvm_caller import Callers
    from soft_pair import Pair

    made = []

    def make(dialect="Gen-1a", *, pages=24, vcpus=1, **options):
        pair = Pair(pages, vcpus=vcpus, streams=0)
        made.append(Callers(pair, dialect, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def pytest_terminal_summary(terminalreporter):
    if RECORD.total:
        terminalreporter.write_line(f"{RECORD.total} encryptions watched for repeated (key, IV)")

"""No process outlives its test, be that failed, interrupted, or killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import SECONDS, child_processes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# A process that starts another one, deaf to SIGTERM both, and says who they are.
STARTER = """
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from tests.processes import Processes, adopt_orphans, child_processes, end_children_but

def deaf(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    other = subprocess.Popen([sys.executable, "-c", code])
    (folder / "part").write_text(f"{os.getpid()} {other.pid}")
    (folder / "part").rename(folder / "pids")
    other.wait()
"""
TEST = (
    STARTER
    + """
def wait_for(path):
    while not path.exists():
        time.sleep(0.05)

def test_it(tmp_path):
    folder = Path(os.environ["FOLDER"])
    with Processes(tmp_path, preloaded=()) as processes:
        processes.start(deaf, folder)
        wait_for(folder / "pids")
        assert os.environ["HOW"] != "fails"
        wait_for(folder / "never")
"""
)
FORGOTTEN = (
    STARTER
    + """
def test_it():
    adopt_orphans()
    known = child_processes()
    code = '''import subprocess, sys
command = [sys.executable, "-c", "import time; time.sleep(3600)"]
print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid)'''
    orphan = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout)
    assert end_children_but(known) == {orphan} and child_processes() == known
"""
)


def wait_until(true):
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    """Whether there is such a process that is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def orphans(known):
    """Children that this process has adopted and that are still there, once those that have ended are collected."""
    for child in child_processes() - known:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
    return child_processes() - known


@contextlib.contextmanager
def running_pytest(folder, code, how=""):
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--noconftest"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HOW": how, "FOLDER": str(folder)}
    command.append(str(folder / "test_it.py"))
    with subprocess.Popen(command, cwd=folder, env=environ, start_new_session=True) as tests:
        try:
            yield tests
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tests.pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes")
@pytest.mark.parametrize("how", ["fails", signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_what_a_test_starts_ends_with_it(tmp_path, how):
    """A process and its own child, with the test that started them, and the servers that these tests had."""
    known = child_processes()
    with running_pytest(tmp_path, TEST, str(how)) as tests:
        wait_until((tmp_path / "pids").exists)
        started = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        if how != "fails":
            assert all(map(is_running, started))
            os.killpg(tests.pid, how)
        assert tests.wait(SECONDS) != 0
    wait_until(lambda: not any(map(is_running, started)) and not orphans(known))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux adopts orphans")
def test_orphans_are_found_and_ended(tmp_path):
    with running_pytest(tmp_path, FORGOTTEN) as tests:
        assert tests.wait(SECONDS) == 0

"""What pytest itself is told: which device the tests see, and that a SIGTERM ends them."""
import os
import signal
import sys


def pytest_configure(config):
    # `pytest -m gpu` alone sees a GPU: the other tests compare bits, which only a CPU repeats.
    os.environ["TESTS_ON"] = "gpu" if config.getoption("markexpr") == "gpu" else "cpu"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures end the processes they started


def pytest_unconfigure(config):
    """End what the tests have started and not ended, with all of its children."""
    common = sys.modules.get("tests.common")
    if common is None:
        return
    for process in common.STARTED:
        if process.poll() is None:
            common.kill_job(process)


def pytest_xdist_auto_num_workers(config):
    # Two processes on two cores; on a GPU one, because its memory is not shared out.
    return 0 if config.getoption("markexpr") == "gpu" else 2

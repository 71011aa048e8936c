"""Plugin of pytest that prints each failure when it happens, for runs that may be cut off.

python -m pytest tests -m gpu -n 6 -p benchmarks.failures_at_once
"""


def pytest_runtest_logreport(report):
    """Print the failure of a phase of a test."""
    if report.failed:
        print(f'\n{report.nodeid}, {report.when}:\n{report.longreprtext}', flush=True)

"""Shows each failure of a pytest run as it comes, so that one that a time limit cuts off has named them: ``-p bench.gpu_failures``."""

from __future__ import annotations

import pytest


class Teller:
    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.pluginmanager.get_plugin("terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.terminal is not None:
            self.terminal.write_line(f"\nFAILED {report.nodeid}\n{report.longreprtext[-2000:]}", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's first process hears of all
        config.pluginmanager.register(Teller(config))

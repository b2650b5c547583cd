"""The application as its processes see it that hold no rank."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["deploy.app.bind", "deploy.app.gateway", "cluster.actors.coordinator"])
def test_proxies_gateway_and_coordinator_do_without_torch(module):
    """Its import is two seconds of a start in each of them, and 200 MB."""
    code = f"import sys, {module}; print('ray' in sys.modules, 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True False\n"

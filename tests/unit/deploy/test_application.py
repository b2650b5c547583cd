"""The Serve application as the processes of Serve see it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["deploy.app.bind", "deploy.app.gateway"])
def test_proxies_and_the_gateway_do_without_torch(module):
    """Its import is two seconds of a start in each of them, and 200 MB."""
    code = f"import sys, {module}; print('ray' in sys.modules, 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True False\n"

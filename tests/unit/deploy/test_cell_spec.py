"""What every rank is told follows from the settings."""

import pytest

from deploy.cell_spec import build_cell_spec
from deploy.config import ShoalConfig


@pytest.mark.parametrize(
    ("device", "transport", "backend"),
    [("cpu", "auto", "auto"), ("cuda", "auto", "nccl"), ("cpu", "gloo", "gloo"), ("cuda", "gloo", "gloo")],
)
def test_the_data_travels_by_what_the_device_is_made_for_unless_gloo_is_asked_for(device, transport, backend):
    settings = ShoalConfig.load(None, {"cell.device": device, "cell.transport": transport})
    assert build_cell_spec(settings).backend == backend


@pytest.mark.parametrize(("given", "told"), [({}, True), ({"engine.prefix_cache": False}, False)])
def test_blocks_are_shared_unless_the_settings_forbid_it(given, told):
    assert build_cell_spec(ShoalConfig.load(None, given)).limits.prefix_cache is told

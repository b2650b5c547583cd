"""The service that tests share which only ask it: a start takes 20 seconds."""

import pytest
import yaml

from tests.serving import MAX_CONCURRENT_REQUESTS, MAX_MODEL_LEN, MAX_NUM_SEQS, running_service


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    """The package's checkpoint behind small limits, one attention replica and two expert shards."""
    config = tmp_path_factory.mktemp("service") / "shoal.yaml"
    settings = {
        "engine": {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS},
        "server": {"max_concurrent_requests": MAX_CONCURRENT_REQUESTS},
    }
    config.write_text(yaml.safe_dump(settings))
    with running_service("--config", str(config)) as running:
        yield running

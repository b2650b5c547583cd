"""What tests of several kernels share."""

from collections.abc import Iterator

import pytest
import torch

from model_shards.kernels import quantized_latents, routing, rows


@pytest.fixture(scope="module", params=["this CPU", "one without AVX-512"])
def built_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a Builder builds: with the instructions that this CPU has, and then without them, as for one that has none.

    Functions are compiled once a process, so they are forgotten on the way in and out.
    """
    compiled = [
        function
        for module in (rows, quantized_latents, routing)
        for function in vars(module).values()
        if hasattr(function, "cache_clear")
    ]
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "this CPU":
            patch.setattr(torch.cpu, "get_capabilities", dict)
        for function in compiled:
            function.cache_clear()
        yield
    for function in compiled:
        function.cache_clear()

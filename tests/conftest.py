"""What holds for all tests."""

from hypothesis import settings

# pytest's timeout bounds each test; how long one example takes says how busy the machine is.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

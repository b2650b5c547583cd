"""The checkpoint that comes with the package."""

from importlib.resources import files
from pathlib import Path


def default_model_directory() -> Path:
    """The small DeepSeek-V2-shaped checkpoint, in Hugging Face layout; read only."""
    return Path(str(files(__name__).joinpath("shoal-demo")))

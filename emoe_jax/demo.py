"""Where the bundled demo model is: in a checkout of the repository. A wheel does not hold it."""

from pathlib import Path

_FOLDER = Path("checkpoints") / "demo"
_BESIDE_THE_CODE = Path(__file__).resolve().parents[1] / _FOLDER

MISSING = (
    f"there is no bundled demo model at {_BESIDE_THE_CODE}, nor in {_FOLDER} of the working directory: it is part of "
    "the repository, not of the package; start in a checkout, or name a model"
)


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def demo_model() -> Path:
    """Its directory: beside the code, else in the working directory. Beside the code, too, where it is in neither."""
    return _FOLDER.absolute() if not _has_model(_BESIDE_THE_CODE) and _has_model(_FOLDER) else _BESIDE_THE_CODE


def is_missing(model: str | Path) -> bool:
    """Whether this is the demo model's directory and the demo model is not there."""
    return Path(model) == demo_model() and not _has_model(demo_model())

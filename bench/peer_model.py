"""The packaged model for engines that read other formats: converted once, into the system's folder for temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

VOCAB_SIZE = 49152


def converted(suffix: str, convert: Callable[[Path, Path], None]) -> Path:
    """The file or directory that `convert` makes of the packaged model; what is there already is taken as it is.

    Args:
        suffix: of its name; one per format.
        convert: (source, target) -> None.

    Raises:
        ImportError: the model's package is missing.
    """
    from engine.weights import find_model

    try:
        source = find_model("smollm2")
    except FileNotFoundError as error:
        raise ImportError(str(error)) from error
    target = Path(tempfile.gettempdir()) / f"{source.stem}-{suffix}"
    if not target.exists():
        # In a folder of its own until it is whole: an interrupted conversion is never taken for the model.
        with tempfile.TemporaryDirectory(prefix=f"{target.name}-") as folder:
            partial = Path(folder) / target.name
            convert(source, partial)
            partial.rename(target)
    return target

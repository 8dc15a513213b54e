"""The start of ``syncbn predict``: lists the files, which needs no torch, while a server imports it for the ranks."""

from collections.abc import Sequence
from pathlib import Path

from syncbn.inference.prediction.files import listed
from syncbn.inference.prediction.options import Options
from syncbn.training.processes import fork_server
from syncbn.training.processes.quick_imports import no_garbage_collection


def predict(run: Path, given: Sequence[Path], options: Options) -> int:
    """Predicts the class of each image; see :func:`syncbn.inference.prediction.predict.predict`.

    Returns:
        The number of files and folders that cannot be read.

    Raises:
        SettingError: there is no image, or see there.
    """
    files = listed(given, options.files_from)
    if options.devices != 1 and len(files.paths) > options.batch_size:
        fork_server.start_server("syncbn.inference.prediction.share")
    with no_garbage_collection():
        from syncbn.inference.prediction import predict as in_ranks
    return in_ranks.predict(run, files, options)

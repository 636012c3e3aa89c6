"""Where torch.compile and Triton keep compiled code, for the processes of a node and for restarts.

torch's own place is below the temporary folder, which is a node's own, and with many schedulers a job's own: a job that
continues on another node would compile again. In a place below the user's cache folder, which nodes usually share, it
does not. Both caches are made for several writers: an entry's name is a hash of all that it depends on, and a file is
written under another name first. C++ is compiled for the processor at hand, which its entry's name does not tell apart,
so each kind of processor has a separate folder.
"""

from __future__ import annotations

import hashlib
import logging
import os

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ffcv_convnext.host import cache_folder, instruction_sets

log = logging.getLogger(__name__)

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}  # name -> part of our folder


def keep_compiled() -> None:
    """Set both variables before the first compilation, unless the user has set them.

    A variable that names torch's own place counts as not set: importing torch's compiler sets it, and launchers pass it
    on to the processes that they start.
    Without TRITON_CACHE_DIR torch uses one folder for each GPU, so that each process of a node would compile the same
    kernels. If the user's cache folder cannot be written, torch's own folders are used, with a warning.
    """
    missing = [name for name in VARIABLES if os.environ.get(name, default_cache_dir()) == default_cache_dir()]
    if not missing:
        return
    digest = hashlib.sha256(instruction_sets().encode()).hexdigest()[:16]
    folder = cache_folder(f"torch_compile-{digest}")
    if folder is None:
        log.warning(
            "the user's cache folder (XDG_CACHE_HOME or ~/.cache) cannot be written: compiled code is kept in the "
            "temporary folder; set %s to a folder that restarts find again",
            " and ".join(missing),
        )
        return
    for name in missing:
        os.environ[name] = str(folder / VARIABLES[name])


def places() -> dict[str, str | None]:
    """Return the folders by variable; None: nothing has been compiled yet, or torch's own choice."""
    return {name: os.environ.get(name) for name in VARIABLES}

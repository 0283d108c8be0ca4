"""Files of a Hugging Face repository: downloaded once, then found in the cache, with or without network."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, get_session

from mmbackdoor.types import InputError

PATIENCE = 6.0


def reachable() -> bool:
    """Whether the hub answers within `PATIENCE` seconds. Its own client tries for 23 seconds and more."""
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception:  # whatever the transport raises means the same here: no answer
            return
        answered.set()

    # In a thread: looking a name up knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return answered.is_set()


def hub_folder(repo_id: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The local folder with those files of `repo_id` that match `patterns`, downloaded if the hub can be reached.

    Raises InputError, within 10 seconds where there is no network: the repository does not exist, needs a login, or
    is neither reachable nor in the cache.
    """
    online = reachable()
    try:
        wanted = list(patterns)
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, local_files_only=not online))
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no hub id: write OWNER/NAME, or give a local folder.") from error
    except GatedRepoError as error:
        raise InputError(f"{repo_id!r} needs a login to the hub: accept its terms, or give a local folder.") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"The hub has no repository {repo_id!r}: check the name, or give a local folder.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{repo_id!r} is not in the local cache and {constants.ENDPOINT} does not answer: give the path of a local "
            "folder with the model instead, or connect to the network and run again."
        ) from error

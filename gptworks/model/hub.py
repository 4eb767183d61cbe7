"""Model folders on the Hugging Face hub: fetched into its cache, and put there from here.

Network, cache, offline mode (HF_HUB_OFFLINE) and the user's token are huggingface_hub's own affair.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptworks.core import folder
from gptworks.core.errors import DataError, StorageError, UsageError
from gptworks.core.log import console

ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?", re.ASCII)
# What a model is read from. Weights come twice in some folders, in another layout.
WANTED = ["README.md", "*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
UNWANTED = ["*/*", "consolidated*"]


def local(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: `model` itself if it is one or no hub id, else that of `owner/name` or
    `owner/name@revision`, fetched where the cache lacks it. `revision` is for an id that says none.

    Raises UsageError without huggingface_hub, DataError for what the hub does not give, StorageError where neither the
    hub nor the cache can be asked.
    """
    model = folder.path(model)
    asked = ID.fullmatch(str(model))
    if model.exists() or not asked:
        return model
    with _asking(f"{model} is no folder here"):
        hub = _library(f"{model}: no such folder; to fetch a model of that name from the hub")
        with _silently(hub):
            wanted = asked["revision"] or revision
            return Path(
                hub.snapshot_download(asked["name"], revision=wanted, allow_patterns=WANTED, ignore_patterns=UNWANTED)
            )


def could_be(model: str) -> bool:
    """True where `local` has something to look for: a folder that is here, or what reads as a name on the hub."""
    return Path(model).is_dir() or ID.fullmatch(model) is not None


def advice(model: str | Path) -> str:
    """Words on how a model of the hub is named, for an error about a name that could be meant for one."""
    plain = re.fullmatch(r"\w[\w.-]*", str(model), re.ASCII)
    return "; one of the hub is named OWNER/NAME, as in openai-community/gpt2" if plain else ""


def origin(path: Path) -> tuple[str, str | None]:
    """`owner/name` and the commit of a folder in the hub's cache, which others can fetch too; of any other its path."""
    commit, snapshots, repository = path.name, path.parent.name, path.parent.parent.name
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return str(path), None
    return repository.removeprefix("models--").replace("--", "/"), commit


def name_of(path: Path) -> str:
    """The `origin` as one string: `owner/name@commit`, which `local` takes, or the path."""
    name, commit = origin(path)
    return f"{name}@{commit}" if commit else name


def push(files: dict[str, Path | bytes], name: str, private: bool = False) -> str:
    """Puts files, by their names, into the repository `owner/name`, made if it is not there; gives its address.

    A file that is there under another name stays. Raises UsageError, DataError, StorageError.
    """
    asked = ID.fullmatch(name)
    if not asked or asked["revision"]:
        raise UsageError(f"{name}: a model on the hub is named OWNER/NAME")
    hub = _library(f"{name}: to put a folder on the hub")
    with _asking(name, "nothing was sent"), _silently(hub):
        api = hub.HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)  # None: as the owner has set it
        parts = [hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=what) for file, what in files.items()]
        api.create_commit(repo_id=name, operations=parts, commit_message="Add files with gptworks")
        return f"{api.endpoint}/{name}"


def _library(what: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError:
        raise UsageError(f'{what}: pip install "gptworks[hub]"') from None
    return huggingface_hub


@contextmanager
def _silently(hub: Any) -> Iterator[None]:
    """Without the library's progress where nothing but warnings is to be said."""
    off = (console.quiet or console.muted) and not hub.utils.are_progress_bars_disabled()
    if off:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if off:
            hub.utils.enable_progress_bars()


@contextmanager
def _asking(what: str, outcome: str = "its cache does not have it") -> Iterator[None]:
    """The library's errors as ours, in one line each; without a network, `outcome` is what came of it."""
    try:
        from huggingface_hub import errors
    except ImportError:  # `_library` says so
        yield
        return
    try:
        yield
    except errors.GatedRepoError:
        raise DataError(
            f"{what}: the hub gives this model only to those who accepted its terms: do so on its page, then `hf auth "
            "login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{what}: the model is on the hub and this revision is not") from None
    except errors.RepositoryNotFoundError:
        raise DataError(f"{what}: no such model on the hub, or a private one; for those, `hf auth login`") from None
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 401)
        if status in (401, 403):
            raise UsageError(
                f"{what}: the hub asks who you are: `hf auth login`, with a token that may do this"
            ) from None
        raise StorageError(f"{what}: the hub answers {status}; try again later") from None
    except errors.HFValidationError as error:
        raise DataError(f"{what}: no name of a model on the hub: {error}") from None
    except ValueError as error:
        raise DataError(f"{what}: the hub refuses it: {' '.join(str(error).split())}") from None
    except (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError) as error:
        cause = error.__cause__ or error
        raise StorageError(
            f"{what}: the hub cannot be reached and {outcome} ({type(cause).__name__}); check the network and "
            "HF_HUB_OFFLINE"
        ) from None

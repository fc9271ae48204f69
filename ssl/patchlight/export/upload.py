"""Uploads a folder to the Hugging Face Hub. Its errors become sentences; the folder stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checks import check, sentence
from ..evaluation.checkpoints import first_line


def check_repository(name: str) -> None:
    """An error unless this can be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        rule = "--push must name a repository as user/name, of letters, digits and single - _ . between them"
        raise ValueError(sentence(rule, repr(name), "for example --push me/my-teacher"))


def upload(folder: Path, repository: str, private: bool, files: Sequence[str]) -> str:
    """Makes the repository if there is none, and uploads these files in one commit. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        public = private and not api.repo_info(repository).private  # it was there before
        if not public:
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=list(files),
                commit_message="patchlight export hub",
            )
    except Exception as error:  # the Hub's own errors, and those of whatever is between here and there
        rule = f"--push {repository} must be able to upload; {folder} is complete"
        raise OSError(sentence(rule, first_line(error), _remedy(error))) from error
    rule, got = "--private needs a repository that is private", f"{repository}, which is public; nothing was uploaded"
    check(not public, rule, got, "change its visibility on the Hub, or choose another name")
    return str(address)


def _remedy(error: Exception) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return "log in with hf auth login, or set HF_TOKEN to a token that may write there"
    if status is not None:
        return f"the Hub answered {status}: check the name, or try again later"
    return "check the network, and the same command uploads it"

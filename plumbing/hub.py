"""The hub: names with a pinned revision, the commits that a process took from it, and pushing a run. Only a name or --push asks for it."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from plumbing.files import UserError

ERRORS = (OSError, HTTPError)  # offline, gated, unknown, no token; a refused connection is an HTTPError only
COMMITS = {}  # {"org/name@revision" or "datasets/org/name", as the config says it: commit} of this process; manifests record it


def parse(name):
    """(repository, revision or None) of "org/name" or "org/name@revision" (a commit, tag or branch); None when it is neither."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(name))
    return match and match.groups()


def repository(name):
    """org/name of a hub name, its revision left out; None for anything else."""
    return (parse(name) or [None])[0]


def dataset_commit(name):
    """The commit that a pinned data set name means; None without a pin. ValueError when the hub does not say."""
    repository, revision = parse(name)
    if revision is None or re.fullmatch(r"[0-9a-f]{40}", revision):  # a whole hash needs no question
        return revision
    try:
        return HfApi().dataset_info(repository, revision=revision).sha
    except ERRORS as error:
        message = f"data {name!r}: the hub names no commit for {revision!r}; expected a revision that exists, or offline the commit"
        raise UserError(f"{message}: {error}") from error


def open_for_push(repository):
    """Create the repository, private, unless it is there, and check that the token may write to it: before training, not after it.

    ValueError when the name or the token will not do.
    """
    name = parse(repository)
    if name is None or name[1]:
        raise UserError(f"push={repository!r}: expected a hub name like 'org/name'")
    api = HfApi()
    try:
        api.whoami()
        api.create_repo(repository, private=True, exist_ok=True)
        api.auth_check(repository, write=True)
    except ERRORS as error:
        message = f"push={repository!r}: expected a repository that the token (HF_TOKEN, or hf auth login) may write to"
        raise UserError(f"{message}: {error}") from error


def final_of(run_dir):
    """run_dir/final. ValueError when no finished model is there."""
    final = Path(run_dir) / "final"
    if not (final / "config.json").is_file():
        raise UserError(f"{final}: no finished model; expected the out_dir of a run that has ended")
    return final


def push(run_dir, repository):
    """Upload run_dir/final to the top of the repository, and run_dir/adapter, if there is one, to adapter/.

    ValueError without a final/, or when the upload fails. Weight files and the adapter of an earlier push are deleted unless they are among
    the new ones: a shard that stayed would be loaded with the others.
    """
    final, adapter = final_of(run_dir), Path(run_dir) / "adapter"
    api, stale = HfApi(), ["*.safetensors", "*.safetensors.index.json", "adapter/*"]
    try:
        api.upload_folder(repo_id=repository, folder_path=final, delete_patterns=stale, commit_message="Upload final/")
        if adapter.is_dir():
            api.upload_folder(repo_id=repository, folder_path=adapter, path_in_repo="adapter", commit_message="Upload adapter/")
    except (*ERRORS, RuntimeError) as error:
        reason = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) else error  # that one only names the file
        message = f"push={repository!r}: the upload failed; `python -m tools.push {run_dir} {repository}` tries again"
        raise UserError(f"{message}: {reason}") from error

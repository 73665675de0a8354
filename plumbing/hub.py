"""The Hugging Face hub: names with a pinned revision, the commits that this process read, pushing a run.

Nothing here connects unless a config names a hub repository or --push is given.
"""

import re
from pathlib import Path

import huggingface_hub  # its parts, and an HTTP client with them, are loaded when they are first named

from plumbing.files import UserError, read_json

# {"org/name@revision" or "datasets/org/name", as the config has it: commit}; manifests record it
COMMITS = {}


def errors():
    """The exceptions of being offline, of gated and unknown names, of no token.

    A refused connection is an HTTPError only.
    """
    from huggingface_hub.errors import HTTPError

    return OSError, HTTPError


def parse(name):
    """(repository, revision or None) of "org/name" or "org/name@revision", else None.

    A revision is a commit, tag or branch. "./folder" and "../folder" are paths.
    """
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", str(name))
    return match.groups() if match else None


def repository(name):
    """org/name of a hub name, without its revision; None for anything else."""
    parts = parse(name)
    return parts[0] if parts else None


def forget(name):
    """Delete a model's snapshot from the cache, and say how many bytes that freed.

    0 for a folder, and for a name that this process did not read.
    """
    if Path(name).is_dir() or name not in COMMITS:
        return 0
    deletion = huggingface_hub.scan_cache_dir().delete_revisions(COMMITS[name])
    deletion.execute()
    return deletion.expected_freed_size


def dataset_commit(name):
    """The commit that a pinned data set name means; None without a pin.

    UserError when the hub does not know it.
    """
    repository, revision = parse(name)
    if revision is None or re.fullmatch(r"[0-9a-f]{40}", revision):  # a whole hash needs no question
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
    except errors() as error:
        problem = f"data {name!r}: the hub names no commit for {revision!r}"
        expected = "expected a revision that exists, or offline the commit"
        raise UserError(f"{problem}; {expected}: {error}") from error


def open_for_push(repository):
    """Create the repository, private, unless it exists.

    Checks before training that the token may write to it. UserError when the name is none or the token may
    not.
    """
    name = parse(repository)
    if name is None or name[1]:
        raise UserError(f"push={repository!r}: expected a hub name like 'org/name'")
    api = huggingface_hub.HfApi()
    try:
        api.whoami()
        api.create_repo(repository, private=True, exist_ok=True)
        api.auth_check(repository, write=True)
    except errors() as error:
        expected = "expected a repository that the token (HF_TOKEN, or hf auth login) may write to"
        raise UserError(f"push={repository!r}: {expected}: {error}") from error


def final_of(run_dir):
    """run_dir/final. UserError when no finished model is there: one may be an earlier run's (--fresh)."""
    final, manifest = Path(run_dir) / "final", Path(run_dir) / "manifest.json"
    is_finished = manifest.is_file() and "finished" in read_json(manifest)
    if not is_finished or not (final / "config.json").is_file():
        raise UserError(f"{final}: no finished model; expected the out_dir of a run that has ended")
    return final


def push(run_dir, repository):
    """Upload run_dir/final to the top of the repository, and run_dir/adapter, if there is one, to adapter/.

    UserError without a final/, or when the upload fails. Weight files and the adapter of an earlier push are
    deleted unless the new ones replace them: a shard that stayed would be loaded with the others.
    """
    final = final_of(run_dir)
    adapter = Path(run_dir) / "adapter"
    api = huggingface_hub.HfApi()
    stale = ["*.safetensors", "*.safetensors.index.json", "adapter/*"]
    try:
        what = {"delete_patterns": stale, "commit_message": "Upload final/"}
        api.upload_folder(repo_id=repository, folder_path=final, **what)
        if adapter.is_dir():
            place = {"folder_path": adapter, "path_in_repo": "adapter"}
            api.upload_folder(repo_id=repository, **place, commit_message="Upload adapter/")
    except (*errors(), RuntimeError) as error:
        reason = error
        if isinstance(error, RuntimeError):  # it only names the file; its cause says what happened
            reason = f"{error} {error.__cause__}"
        again = f"`python -m tools.push {run_dir} {repository}` tries again"
        raise UserError(f"push={repository!r}: the upload failed; {again}: {reason}") from error

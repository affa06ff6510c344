"""Say why the Hub does not give a model, and what to do about it."""

from __future__ import annotations


def hub_fault(name: str, revision: str | None, error: Exception) -> str:
    """Returns the reason for which huggingface_hub raised ``error`` when it was asked for ``name``, with the cure.

    Its own messages begin with a status and the number of the request; the reason comes lines later, or not at all.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    causes = (error, error.__cause__)
    if any(isinstance(each, GatedRepoError) for each in causes):  # which is a kind of RepositoryNotFoundError
        return f"it is gated; accept its licence on its page (https://huggingface.co/{name}) and log in: hf auth login"
    if any(isinstance(each, RevisionNotFoundError) for each in causes):
        return f"it has no revision {revision}; look at model.revision (a commit, tag or branch)"
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):
        return (
            "there is no such repository, or it is private and you are not logged in to an account that may read it; "
            "correct the name, or log in: hf auth login"
        )
    return " ".join(str(error).split())[:300] or type(error).__name__

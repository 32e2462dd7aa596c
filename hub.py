"""Names on the Hugging Face hub, and its refusals in words."""

from huggingface_hub.errors import HfHubHTTPError

TIMEOUT_SECONDS = 5  # for what is asked before a run begins


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub name and, where it comes as NAME@REVISION, the branch, tag or commit that it is pinned to."""
    name, _, revision = name.partition("@")
    return name, revision or None


def status_of(error: HfHubHTTPError) -> str:
    return "no status" if error.response is None else f"HTTP {error.response.status_code}"

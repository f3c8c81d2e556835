"""Files of a model on the Hub by byte range, and what the Hub's answers mean.

A file is addressed as ``hf://OWNER/NAME@COMMIT/PATH``: the commit pins its content. The token and
the endpoint are those of huggingface_hub: ``HF_TOKEN`` or the login, and ``HF_ENDPOINT``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from lestd_kernels.errors import LestdError
from workers.storage.retries import TransientError, is_transient_status

HUB_SCHEME = "hf://"
TIMEOUT_SECONDS = 30.0


class HubUnreachableError(TransientError):
    """No answer from the Hub."""


class HubOfflineError(HubUnreachableError):
    """The Hub is not to be asked: ``HF_HUB_OFFLINE`` is set."""

    worth_a_try = False


def stat_hub_file(url: str) -> tuple[int, str]:
    """Size in bytes and ETag of a file on the Hub; the ETag of a large one is its sha256.

    Raises:
        LestdError: it cannot be had; `TransientError` if another try may help.
    """
    model, commit, name = _parse(url)
    with explain_hub_errors(model, commit):
        address = hf_hub_url(model, name, revision=commit)
        found = get_hf_file_metadata(address, timeout=TIMEOUT_SECONDS)
        if found.size is None:
            raise LestdError(
                f"the server of {model} does not say how large {name} is; download the model and "
                "give its directory"
            )
        return found.size, found.etag or ""


def stream_hub_file(url: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from `start` up to `stop` of a file on the Hub, in pieces as they arrive.

    Raises:
        LestdError: as `stat_hub_file`; also if the server ignores the range that is asked for.
    """
    model, commit, name = _parse(url)
    headers = build_hf_headers()
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with explain_hub_errors(model, commit):
        address = hf_hub_url(model, name, revision=commit)
        # Streamed, so that a server that ignores Range cannot send the whole shard.
        with get_session().stream(
            "GET", address, headers=headers, timeout=TIMEOUT_SECONDS
        ) as response:
            hf_raise_for_status(response)
            given = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not given.startswith(f"bytes {start}-"):
                raise LestdError(
                    f"the server of {model} does not answer range requests; download the model "
                    "and give its directory"
                )
            yield from response.iter_raw()


def _parse(url: str) -> tuple[str, str, str]:
    """Model, commit and file of an address."""
    model, _, rest = url.removeprefix(HUB_SCHEME).partition("@")
    commit, _, name = rest.partition("/")
    return model, commit, name


@contextmanager
def explain_hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a sentence.

    Raises:
        LestdError: `TransientError` where another try may help, `HubUnreachableError` where
            there was no answer.
    """
    where = f"{model} at revision {revision}" if revision else model
    try:
        yield
    except LestdError:
        raise
    except HFValidationError as error:
        raise LestdError(
            f"{model} is neither a directory nor a Hub id; expected an existing directory, "
            "OWNER/NAME, or a URL such as s3://BUCKET/PREFIX"
        ) from error
    except GatedRepoError as error:
        raise LestdError(
            f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model}, log in with "
            "`hf auth login`, and run the command again"
        ) from error
    except RevisionNotFoundError as error:
        raise LestdError(f"{model} has no revision {revision!r}; check --revision") from error
    except RepositoryNotFoundError as error:
        raise LestdError(
            f"{model} is neither a directory here nor a model on the Hub that you may read; check "
            "the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise LestdError(
            f"a file of {where} is absent from the Hub ({' '.join(str(error).split())}); tell its "
            "publisher, or choose another --revision"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if is_transient_status(status):
            wait = error.response.headers.get("Retry-After", "")
            raise TransientError(
                f"the Hub answered {status} for {where}; try again later",
                wait_seconds=float(wait) if wait.isdecimal() else 0.0,
            ) from error
        hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise LestdError(f"the Hub answered {status} for {where}; {hint}") from error
    except Exception as error:
        # Whatever HTTP client huggingface_hub uses has errors of its own for a dead connection.
        offline = isinstance(error, OfflineModeIsEnabled)
        raise (HubOfflineError if offline else HubUnreachableError)(
            f"{where} is not a directory here, is not in the local cache, and the Hub cannot be "
            f"reached ({type(error).__name__}); check the connection and HF_HUB_OFFLINE, or give a "
            "local directory"
        ) from error

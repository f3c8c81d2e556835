"""Runs in an object store."""

import hashlib

import fsspec

from support.cli import Finished

SERIAL = ("--keep", 0.5, "--executor", "serial")


def objects(url: str) -> dict[str, bytes]:
    """Everything below a URL, as an fsspec of its own sees it."""
    store = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    root = url.removeprefix("s3://") + "/"
    return {name.removeprefix(root): store.cat_file(name) for name in store.find(root)}


def digest_objects(url: str) -> dict[str, str]:
    """As `digest_tree`."""
    found = objects(url).items()
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in found
        if not name.startswith("manifest/")
    }


def refused(result: Finished, *words: str) -> None:
    assert result.code == 2, (result.out, result.err)
    message = result.err[result.err.index("error: ") :]
    assert message.count("\n") == 1
    assert all(word in message for word in words), message

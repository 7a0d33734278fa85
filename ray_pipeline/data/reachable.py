"""Whether object storage answers, told in words that name the key, before work begins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn
from urllib.parse import parse_qsl

import pyarrow as pa
from pyarrow import fs

from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder, StorageError, is_uri, shown

#: pyarrow's own settings wait 6 s where nothing listens, and 100 s where something listens and says nothing
_CONNECT_SECONDS, _ANSWER_SECONDS, _ATTEMPTS = 3, 10, 2
#: options of an S3 URI that the constructor takes, too
_OPTIONS = {"scheme", "endpoint_override", "region", "tls_ca_file_path"}
_NO_BUCKET = r"NO_SUCH_BUCKET|Bucket '.*' not found"
_NO_ANSWER = r"NETWORK_CONNECTION|curlCode"
_DENIED = r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|CLIENT_TOKEN|EXPIRED|UNAUTHORIZED|Access Denied|\b40[13]\b"


def check_reachable(key: str, location: str) -> None:
    """UserError that names the key, what was found and what to do, where the bucket of a URI is not there, denies
    access or does not answer."""
    folder = Folder(location)
    try:
        there = folder.local is not None or _bucket_is_there(folder)
    except (UserError, pa.ArrowException, OSError) as error:
        _refuse(key, location, error)
    if not there:
        _refuse(key, location, "NO_SUCH_BUCKET")


@contextmanager
def naming(key: str, location: str) -> Iterator[None]:
    """Let what goes wrong within in object storage be told with its key."""
    try:
        yield
    except StorageError as error:
        if not is_uri(location):
            raise
        _refuse(key, location, error)


def _bucket_is_there(folder: Folder) -> bool:
    filesystem, path = _impatient(folder), folder.opened[1]
    # a folder that may be listed may be so where its bucket may not be asked for
    if filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        return True
    return filesystem.get_file_info(path.partition("/")[0]).type != fs.FileType.NotFound


def _impatient(folder: Folder) -> fs.FileSystem:
    """A connection of its own, that soon gives up where it can be told to."""
    filesystem = folder.opened[0]
    options = dict(parse_qsl(folder.location.partition("?")[2]))
    if not isinstance(filesystem, fs.S3FileSystem) or options.keys() - _OPTIONS:
        return filesystem
    patience = {"connect_timeout": _CONNECT_SECONDS, "request_timeout": _ANSWER_SECONDS}
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
    return fs.S3FileSystem(**options | {"region": filesystem.region}, **patience, retry_strategy=retry)


def _refuse(key: str, location: str, error: Exception | str) -> NoReturn:
    """Raise the UserError that fits the words of `error`, a StorageError where it may pass."""
    where, found = f"{key}={shown(location)}", " ".join(str(error).split())
    if re.search(_NO_BUCKET, found):
        raise UserError(f"{where}: there is no such bucket; create it, or correct its name or the endpoint") from None
    reason = re.sub(r"^(.*?) cannot be used \((.*)\);.*$|^.*?\((.*)\);.*$", r"\1\3: \2", found).strip(": ")[:300]
    if re.search(_NO_ANSWER, found):
        raise StorageError(
            f"{where}: the endpoint does not answer ({reason}); correct endpoint_override=HOST:PORT and scheme=http or "
            "https behind the ? of the URI, or its region, or check the network"
        ) from None
    if re.search(_DENIED, found):
        raise UserError(
            f"{where}: access is denied ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            "of somebody who may list, read and write there in the environment of every node"
        ) from None
    passes = not isinstance(error, UserError) or error.passing
    raise (StorageError if passes else UserError)(
        f"{where} cannot be used ({reason}); check the location, the credentials in the environment and the network"
    ) from None

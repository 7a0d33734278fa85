"""A bucket that is not there, refuses or does not answer is told with key and URI, within seconds."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ray_pipeline.data.reachable import check_reachable, naming
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder, StorageError


class _Refusing(BaseHTTPRequestHandler):
    """What S3 answers to somebody without rights."""

    def do_GET(self):
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing(aws_environment) -> Iterator[str]:
    """HOST:PORT of a server that denies everything."""
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def told(location: str, key: str = "data.root", *, passing: bool = False) -> str:
    """The error, which comes soon and in one sentence; passing: it may be over later."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        check_reachable(key, location)
    assert time.monotonic() - start < 10
    assert error.value.passing == passing
    text = str(error.value)
    assert re.match(rf"{key}={location.partition('?')[0]}[: ]", text)  # not what stands behind the ?
    assert "\n" not in text
    return text


def test_what_answers_is_not_complained_of(s3, s3_server, tmp_path):
    before = len(s3_server.requests)
    check_reachable("data.root", s3)
    check_reachable("data.root", Folder(s3).child("nothing here").location)
    check_reachable("data.root", s3.replace("http%3A%2F%2F", "") + "&scheme=http&region=eu-west-1")
    assert len(s3_server.requests) - before <= 6
    check_reachable("data.root", (tmp_path / "not there").as_uri())


def test_a_bucket_that_is_not_there(s3_server):
    endpoint = urlsplit(s3_server.endpoint).netloc
    text = told(f"s3://absent/data?endpoint_override={endpoint}&scheme=http")
    assert "there is no such bucket; create it" in text


def test_access_that_is_denied(refusing):
    text = told(f"s3://bucket/latents?endpoint_override={refusing}&scheme=http", "data.latents")
    assert "access is denied (" in text
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in text


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_endpoint_where_nothing_listens_or_speaks_another_protocol(s3_server, scheme):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
    endpoint = dead if scheme == "http" else urlsplit(s3_server.endpoint).netloc
    text = told(f"s3://tests/data?endpoint_override={endpoint}&scheme={scheme}", passing=True)
    assert "the endpoint does not answer (" in text
    assert "correct endpoint_override=HOST:PORT and scheme=http or https" in text


def test_a_uri_that_pyarrow_does_not_open():
    assert "Unrecognized filesystem" in told("floppy://bucket/data")
    assert "Unexpected query parameter" in told("s3://bucket/data?endpoint=here&region=eu-west-1")


def test_what_is_refused_later_names_its_key_and_file(s3_server):
    uri = s3_server.make_bucket("closed")
    s3_server.put("closed/a.csv", b"id,image\n")
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::closed/*"]}
    s3_server.make_bucket("closed", {"Version": "2012-10-17", "Statement": [deny]})
    check_reachable("data.root", uri)
    match = r"^data\.root=s3://closed: access is denied \(s3://closed/a\.csv: .*ACCESS_DENIED.*; set AWS_"
    with pytest.raises(UserError, match=match), naming("data.root", uri):
        Folder(uri).read("a.csv")


def test_errors_of_a_disk_and_of_the_data_pass(tmp_path, s3):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used") as error, naming("data.root", str(tmp_path)):
        Folder(tmp_path / "file").names()
    assert not error.value.passing  # it is a file, however often it is asked for
    with pytest.raises(StorageError, match="No space left") as error, Folder(tmp_path).reaching("file"):
        Path("/dev/full").write_text("more than there is room for")
    assert error.value.passing
    with pytest.raises(UserError, match=r"^a tile is bad$"), naming("data.root", s3):
        raise UserError("a tile is bad")

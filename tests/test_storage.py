"""Files appear whole or not at all, on a disk and in S3, and what cannot be used is named in one sentence."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder, is_uri, replace_file, shown


@pytest.fixture(params=["path", "file", "s3"])
def folder(request, tmp_path) -> Folder:
    """A folder that is not there yet: a path, a file:// URI with a blank in it, S3."""
    if request.param == "s3":
        return Folder(request.getfixturevalue("s3")).child(tmp_path.name)
    place = tmp_path / "a b"
    return Folder(place if request.param == "path" else place.as_uri())


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "Request ID" not in text
    assert text.isascii()
    return text


def test_what_is_written_is_read_back(folder):
    folder.write("parts.bin", [b"abc", bytearray(b"def"), memoryview(b"ghi")])
    folder.write("empty.bin", b"")
    assert folder.read("parts.bin") == b"abcdefghi"
    assert folder.read("empty.bin") == b""
    assert [folder.size(name) for name in ("parts.bin", "empty.bin", "none.bin")] == [9, 0, -1]
    with folder.open("parts.bin") as file:
        assert file.read_at(3, 4) == b"efg"
        assert file.size() == 9


def test_a_second_write_replaces_the_first(folder):
    folder.write("a", b"long old content")
    folder.write("a", b"new")
    assert folder.read("a") == b"new"
    assert folder.names() == ["a"]


@pytest.mark.parametrize("later", [b'{"step": 7}', b'{"step": 12, "kind": "safety"}'], ids=["shorter", "longer"])
def test_a_file_that_is_replaced_while_it_is_read_comes_as_the_old_or_the_new_one(s3, s3_server, tmp_path, later):
    folder = Folder(s3).child(tmp_path.name)
    folder.write("state.json", b'{"step": null, "kind": 1}')
    path = f"tests/{tmp_path.name}/state.json"
    s3_server.meanwhile[f"/{path}"] = lambda: s3_server.put(path, later)
    assert folder.read("state.json") == later
    assert not s3_server.meanwhile


def test_a_file_of_several_upload_parts_comes_back_whole(folder):
    data = os.urandom(1 << 20)
    folder.write("big", [data] * 12)  # pyarrow sends 10 MiB at a time
    assert folder.size("big") == 12 << 20
    assert folder.read("big") == data * 12


def test_names_are_of_files_alone_and_a_missing_folder_has_none(folder):
    assert folder.names() == []
    assert folder.child("below").names() == []
    for name in ("b", "a"):
        folder.write(name, b"12")
    folder.child("below").write("c", b"345")
    assert folder.names() == ["a", "b"]
    assert folder.sizes() == {"a": 2, "b": 2}
    assert folder.child("below").names() == ["c"]
    assert folder.size("below") == -1


def test_removing_leaves_no_file_and_what_is_not_there_is_no_error(folder):
    for name in ("a", "b", "c"):
        folder.write(name, b"x")
    folder.remove(["a", "none", "c"])
    assert folder.names() == ["b"]
    folder.remove(["b"])  # S3 now holds an empty object in the folder's place
    folder.remove(["b"])
    assert folder.names() == []
    assert folder.size("b") == -1
    folder.write("b", b"again")
    assert folder.names() == ["b"]


def test_a_file_that_is_not_there_stays_a_file_not_found_error(folder):
    for read in (folder.read, folder.open, folder.child("below").read):
        with pytest.raises(FileNotFoundError):
            read("none")


def test_a_write_that_fails_half_way_leaves_no_piece(folder):
    with pytest.raises(TypeError):
        folder.write("a", [b"x" * (6 << 20), None])
    assert folder.size("a") == -1
    assert folder.names() == []


def test_folders_below_and_above(folder):
    below = folder.child("one", "two words")
    below.write("a", b"1")
    assert folder.child("one").child("two words").read("a") == b"1"
    assert below.parent.parent.location == folder.location
    assert Folder(below.location).read("a") == b"1"


def test_a_folder_travels_without_its_connection(folder):
    folder.write("a", b"1")
    data = pickle.dumps(folder)
    assert len(data) < 500
    assert pickle.loads(data).read("a") == b"1"


@pytest.mark.parametrize(
    ("location", "below", "above"),
    [
        ("/data/store", "/data/store/x", "/data"),
        ("/data/store/", "/data/store/x", "/data"),
        ("/store", "/store/x", "/"),
        ("/", "/x", "/"),
        ("s3://bucket/a/b", "s3://bucket/a/b/x", "s3://bucket/a"),
        ("s3://bucket/a/?region=eu", "s3://bucket/a/x?region=eu", "s3://bucket?region=eu"),
        ("s3://bucket", "s3://bucket/x", "s3://bucket"),
        ("s3://bucket?scheme=http", "s3://bucket/x?scheme=http", "s3://bucket?scheme=http"),
        ("file:///data", "file:///data/x", "file:///data"),
    ],
)
def test_below_and_above_of_every_kind_of_location(location, below, above):
    assert Folder(location).child("x").location == below
    assert Folder(location).parent.location == above
    assert is_uri(location) == (not location.startswith("/"))


def test_a_relative_path_means_the_same_after_the_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("store")
    monkeypatch.chdir("/")
    folder.write("a", b"1")
    assert (tmp_path / "store" / "a").read_bytes() == b"1"
    assert folder.local == tmp_path / "store"


def test_only_a_disk_has_local_paths(tmp_path, s3):
    assert Folder((tmp_path / "a b").as_uri()).local == tmp_path / "a b"
    assert Folder(s3).local is None


def test_messages_name_a_file_without_the_options_of_the_uri(s3):
    assert Folder(s3).child("a b").where("index.json") == "s3://tests/a%20b/index.json"
    assert Folder("/data").where("index.json") == "/data/index.json"


def test_the_endpoint_may_come_from_the_environment(s3, s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    Folder(f"s3://tests/{tmp_path.name}").write("a", b"1")
    assert Folder(s3).child(tmp_path.name).read("a") == b"1"


def test_the_endpoint_may_be_given_with_its_scheme_apart(s3, s3_server, tmp_path):
    host = s3_server.endpoint.removeprefix("http://")
    Folder(f"s3://tests/{tmp_path.name}?endpoint_override={host}&scheme=http").write("a", b"1")
    assert Folder(s3).child(tmp_path.name).read("a") == b"1"


def test_what_a_bucket_refuses_is_named(s3_server):
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::closed/*"]}
    folder = Folder(s3_server.make_bucket("closed", {"Version": "2012-10-17", "Statement": [deny]})).child("runs")
    for refused in (folder.size, folder.read, folder.open, lambda name: folder.write(name, b"x")):
        with pytest.raises(
            UserError, match=r"s3://closed/runs/a cannot be used \(AWS Error ACCESS_DENIED.*\); check"
        ) as e:
            refused("a")
        assert "credentials" in one_sentence(e)
    with pytest.raises(UserError, match="s3://closed/runs/a"):
        folder.remove(["a"])


def test_a_bucket_that_is_not_there_is_named(s3_server):
    folder = Folder(f"s3://nowhere/runs?endpoint_override={quote(s3_server.endpoint, safe='')}")
    assert folder.names() == []
    assert folder.size("a") == -1
    with pytest.raises(
        UserError, match=r"s3://nowhere/runs/a cannot be used .*bucket does not exist\); check"
    ) as error:
        folder.write("a", b"x")
    one_sentence(error)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("ftp://host/a", "Unrecognized filesystem"),
        ("s3://bucket/a b", "syntax error"),
        ("s3://bucket/a?colour=red", "colour"),
        ("s3:///a", ""),
    ],
)
def test_a_location_that_pyarrow_does_not_open_is_named(location, said):
    with pytest.raises(
        UserError, match=rf"{location[:9]}.*is no location that pyarrow opens.*{said}.*such as s3://"
    ) as error:
        Folder(location).names()
    one_sentence(error)


@pytest.mark.parametrize(
    "location",
    [
        "s3://AKIA:se3cret@bucket/a",
        "s3://AKIA:se3/cr3et@bucket/a?region=eu",
        "s3://AKIA:se3?cret@bucket/a",
        "abfss://c:se3cret@bucket/a",
        "s3://bucket/a?endpoint_override=http://me:se3cret@host:9000",
        "s3://bucket/a?endpoint_override=http%3A%2F%2Fme%3Ase3cret%40host%3A9000",
        "s3://bucket/a?region=eu&access_key=AKIA&secret_key=se3cret",
        "s3://bucket/a?X-Amz-Signature=se3cret",
        "s3://bucket/a?secret%5Fkey=se3cret",
        "abfss://c@bucket/a?tenant_id=t&client_id=i&client_secret=se3cret",
        "abfss://c@bucket/a?sv=1&sig=se3cret",
        "abfss://c@bucket/a?AccountKey=se3cret",
        "gs://bucket/a?access_token=se3cret",
        "gs://bucket/a?password=se3cret",
    ],
)
def test_a_credential_in_a_location_is_refused_and_not_repeated(location):
    with pytest.raises(UserError, match=r"the location in .* holds a password or key .*environment of every") as error:
        Folder(location)
    assert "se3" not in one_sentence(error)
    assert "cret@" not in str(error.value)
    assert "bucket/a" in str(error.value) or "?cret" in location


@pytest.mark.parametrize(
    "location",
    [
        "abfss://container@account.dfs.core.windows.net/a",
        "abfss://container@account.dfs.core.windows.net/a?tenant_id=t&client_id=i&credential_kind=cli",
        "s3://bucket/a@b:c@d?endpoint_override=http%3A%2F%2Fhost%3A9000&scheme=http&region=eu",
        "s3://bucket/a?endpoint_override=host:9000&allow_bucket_creation=true&tls_ca_file_path=/etc/ca.pem",
        "gs://anonymous@bucket/a?endpoint_override=host:9000&retry_limit_seconds=3&project_id=monkeys",
        "file:///data/me:us@there/a",
    ],
)
def test_options_of_a_location_that_are_no_credentials_are_kept(location):
    assert Folder(location).location == location


def test_locations_are_shown_without_user_and_options():
    assert shown("s3://bucket/run?endpoint_override=host") == "s3://bucket/run"
    assert shown("abfss://container@account/run?sig=a") == "abfss://account/run"
    assert shown("/data/a?b@c") == "/data/a?b@c"


def test_a_disk_that_takes_no_more_is_named_and_the_old_file_stays(tmp_path):
    folder = Folder(tmp_path)
    folder.write("a", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=rf"{tmp_path}/a cannot be used \(File too large\); check.*space") as error:
            folder.write("a", b"x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_sentence(error)
    assert folder.read("a") == b"old"
    assert folder.names() == ["a"]


def test_a_file_in_a_folders_place_is_named(tmp_path):
    (tmp_path / "store").write_bytes(b"")
    folder = Folder(tmp_path / "store")
    for use in (folder.names, lambda: folder.write("a", b"1"), lambda: folder.read("a")):
        with pytest.raises(UserError, match=rf"{tmp_path}/store.*(Not a directory|File exists)"):
            use()


def test_replacing_a_file_makes_its_folder(tmp_path):
    replace_file(tmp_path / "one" / "two" / "a", [b"12", b"3"])
    assert (tmp_path / "one" / "two" / "a").read_bytes() == b"123"
    assert [path.name for path in (tmp_path / "one" / "two").iterdir()] == ["a"]


def test_replacing_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    replace_file(tmp_path / "a", b"old")
    for broken, error in (([b"new", None], TypeError), (["text"], TypeError)):
        with pytest.raises(error):
            replace_file(tmp_path / "a", broken)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "folder", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_a_reader_finds_the_old_file_or_the_new_one(tmp_path):
    path, size, done = tmp_path / "a", 100_000, threading.Event()
    replace_file(path, b"0" * size)
    seen = set()

    def read() -> None:
        while not done.is_set():
            content = path.read_bytes()
            seen.add((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        replace_file(path, [str(number % 10).encode() * (size // 4)] * 4)
    done.set()
    reader.join()
    assert seen == {(size, 1)}


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    program = (
        "import itertools, sys; from ray_pipeline.storage import replace_file\n"
        "for n in itertools.count(): replace_file(sys.argv[1], [str(n % 10).encode() * 50_000] * 20)\n"
    )
    path = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[1]) as writer:
        while not path.exists():
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
    content = path.read_bytes()
    assert (len(content), len(set(content))) == (1_000_000, 1)

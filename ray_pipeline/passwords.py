"""What looks like a credential in names, values and URLs: none may be in what is stored, listed or logged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

#: words, between underscores, in the name of a variable, or of an option of a URI, that holds a credential
_WORDS = re.compile(
    r"(?:^|_)(?:"
    r"[A-Z0-9]*(?:(?:PASSWORD|PASSWD|PASSPHRASE|PWD|SECRET|CREDENTIAL)S?|TOKEN|CONNSTR|CONNECTION_?STRING)|"
    r"(?<!MAX_)(?<!MIN_)(?<!NUM_)(?<!NEW_)[A-Z0-9]*TOKENS|(?!BY|COM|ASK)[A-Z0-9]*PASS|KEY|"
    r"(?:API|ACCESS|ACCOUNT|PRIVATE|SECRET|SHARED|MASTER|SIGNING|ENCRYPTION|SSH)_?KEYS?|"
    r"PAT|SAS|SIG|SIGNATURE|AUTH|JWT|WEBHOOK"
    r")(?:_|$)"
)
#: a name that ends so only says where a credential lies, or of what kind it is
_PLACES = ("_FILE", "_PATH", "_DIR", "_KIND")
#: known names that only say it too
_PLACE_NAMES = {
    "GOOGLE_APPLICATION_CREDENTIALS", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"
}  # fmt: skip
#: credentials that can be told by their form: keys of Azure, AWS and Google, tokens of GitHub, GitLab, Hugging Face and
#: Slack, private keys
_FORMS = re.compile(
    r"(?i:AccountKey|SharedAccessKey|SharedAccessSignature)=|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}|"
    r"\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}|\bhf_[A-Za-z0-9]{20,}|\bxox[abprs]-[\w-]{10,}|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(\S*)")


def names_credential(name: str) -> bool:
    """Whether a variable or an option of this name holds a credential itself."""
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name)
    words = "_".join(word for word in re.split(r"[^A-Za-z0-9]+", words.upper()) if word)
    return _WORDS.search(words) is not None and not words.endswith(_PLACES) and words not in _PLACE_NAMES


def uri_credential(uri: str) -> str | None:
    """Where one URI holds a credential, in words that do not tell it; None where it holds none."""
    scheme, _, rest = uri.partition("://")
    place, _, query = rest.partition("?")
    # a secret may hold a slash; in a URL of the web an @ of the path is none of a user's
    web = scheme.lower().rpartition("+")[2] in ("http", "https")
    if re.match(r"[^/@]+@" if web else r"[^/:@]*:[^@]*@", unquote(place)):
        return "a password before the @"
    for name, _, value in (option.partition("=") for option in query.split("&")):
        if names_credential(unquote(name)):
            return f"the option {unquote(name)}"
        if "@" in unquote(name + value):
            return "a password in an option"
    return None


def holds_credential(text: str) -> bool:
    """Whether a text holds a credential that its form shows, alone or in a URL."""
    urls = (f"{scheme}://{rest}" for scheme, rest in _URL.findall(text))
    return _FORMS.search(text) is not None or any(uri_credential(url) for url in urls)


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text within lists and mappings, their keys too, each with the dotted key of its place."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from texts(name, key)
            yield from texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from texts(inner, f"{key}.{number}")

"""The whole workflow on the command line, and that no key is ever shown."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest

from privet.cli import main
from privet.cli.passphrase import read_passphrase
from privet.errors import UsageError
from privet.images import write_images
from privet.licensing import Vendor, read_licence, sealed
from tests.conftest import blobs
from tests.licensing.conftest import OURS, THEIRS, World

WORDS = {"ours": "a phrase of the vendor's", "theirs": "a phrase of the licensee's"}


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    seal = sealed.seal

    def easy(content: bytes, passphrase: str, *, work: int = 0) -> bytes:
        return seal(content, passphrase, work=4)

    monkeypatch.setattr(sealed, "seal", easy)


def contains(haystack: bytes, secret: bytes) -> bool:
    ways = [secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()]
    for offset in range(3):  # wherever it may lie in a longer base64 text
        text = base64.b64encode(b"\0" * offset + secret)
        whole = text[4 if offset else 0 : len(text) - 4]
        ways += [whole, whole.replace(b"+", b"-").replace(b"/", b"_")]
    return any(way in haystack for way in ways)


def test_the_search_finds_what_it_looks_for() -> None:
    secret = bytes(range(200, 232))
    for text in (
        b"x" + secret,
        f"key {secret.hex()}".encode(),
        str(secret).encode(),
        base64.b64encode(b"ab" + secret + b"c"),
        base64.urlsafe_b64encode(b"a" + secret),
    ):
        assert contains(text, secret)
    assert not contains(bytes(1000), secret)


def test_from_keys_to_a_leak(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVET_DEBUG", "")
    for name, words in WORDS.items():
        (tmp_path / name).write_text(words + "\n")
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    keys, clean, folder = tmp_path / "vendor", tmp_path / "clean", tmp_path / "protected"
    shown = ""

    def run(*arguments: object, code: int = 0) -> str:
        nonlocal shown
        result = main([str(one) for one in ("license", *arguments)])
        captured = capfd.readouterr()
        shown += captured.out + captured.err
        assert result == code, captured.err
        assert "Traceback" not in captured.out + captured.err
        return captured.out + captured.err

    assert "public name" in run("keygen", keys, "--passphrase-file", ours)
    vendor = Vendor.open(keys, WORDS["ours"])
    images = blobs(12)
    write_images(images, images, clean, workers=1)
    made = ("protect", clean, "--keys", keys, "--name", "cats", "--out", folder, "--passphrase-file", ours)
    small = ("surrogate=cnn-w4", "max_rounds=2", "train_steps=3", "batch_size=6")
    assert "12 images protected for cats" in run(*made, *(part for one in small for part in ("--set", one)))
    assert not (folder / "surrogate.safetensors").exists() and (keys / "cats.surrogate.safetensors").exists()
    (tmp_path / "recipe.json").write_text('{"architecture": "cnn-w4", "epochs": 1, "batch_size": 6}')

    made = ("release", folder, "--keys", keys, "--name", "cats", "--passphrase-file", ours)
    stem = ("--clean", clean, "--recipe", tmp_path / "recipe.json")
    assert "Through the stem" in run(*made, *stem, "--stem", "--stem-group", 6, code=20)
    assert "names no audit" in run(*made, *stem)
    give = ("issue", "cats", "--keys", keys, "--vendor-passphrase-file", ours, "--passphrase-file", theirs)
    assert "give --protected and --clean" in run(
        *give, "--licensee", "Ada", "--out", tmp_path / "a", "--copy", tmp_path / "c", code=2
    )
    for name, more in (("Ada", ("--expires", "2100-01-01")), ("Bo", ())):
        out = run(
            *give, "--licensee", name, "--out", tmp_path / f"{name}.licence", *more,
            "--copy", tmp_path / f"{name}-copy", "--protected", folder, "--clean", clean,
        )  # fmt: skip
        assert "12 images fingerprinted as copy" in out

    entries = (keys / "ledger.jsonl").read_bytes()
    out = run(
        *give, "--licensee", "Cy", "--out", tmp_path / "Cy.licence",
        "--copy", tmp_path / "Cy-copy", "--protected", tmp_path / "Ada-copy", "--clean", clean, code=2,
    )  # fmt: skip
    assert "Ada-copy is a licensee's copy" in out and not (tmp_path / "Cy.licence").exists()
    assert (keys / "ledger.jsonl").read_bytes() == entries

    licence = ("--licence", tmp_path / "Ada.licence", "--passphrase-file", theirs)
    out = run("verify", tmp_path / "Ada-copy", *licence, "--vendor", keys / "vendor.pub")
    assert "The licence of Ada holds for cats until 2100-01-01." in out and "(12 images)" in out
    assert "as the vendor signed" in run("verify", folder, "--vendor", keys / "vendor.pub")
    assert "goes with" in run("verify", tmp_path / "Bo-copy", *licence, code=29)
    assert "anybody could have signed" in run("verify", folder, code=2)
    assert "does not open" in run(
        "verify", folder, "--licence", tmp_path / "Ada.licence", "--passphrase-file", ours, code=27
    )
    options = ("--device", "cpu", "--precision", "float32")
    out = run("train", tmp_path / "Ada-copy", "--test", clean, *licence, "--out", tmp_path / "net", *options)
    assert "behind the licence's stem" in out and (tmp_path / "net/learner.safetensors").exists()

    look = ("--protected", folder, "--keys", keys, "--name", "cats", "--passphrase-file", ours)
    out = run("trace", tmp_path / "Bo-copy", *look)
    assert "Bo (copy" in out and "Ada" not in out and "probability of at most" in out
    rows = json.loads(run("trace", tmp_path / "Bo-copy", *look, "--json").splitlines()[0])
    assert [(row["licensee"], row["guilty"]) for row in rows] == [("Bo", True), ("Ada", False)]
    assert "No copy can be named: 2 compared" in run("trace", clean, *look)

    torn = (tmp_path / "Ada.licence").read_bytes()[:-5]
    (tmp_path / "torn").write_bytes(torn)
    assert "truncated" in run(
        "verify", folder, "--licence", tmp_path / "torn", "--passphrase-file", theirs, code=26
    )
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert "no terminal to ask" in run("keygen", tmp_path / "more", code=2)

    opened = read_licence(tmp_path / "Ada.licence", WORDS["theirs"])
    secrets = {
        "secret": vendor._secret,
        "signing": vendor._signing,
        "salt": opened.salt,
        "stem": vendor._derive("stem", "cats"),
        "fingerprint": vendor.fingerprint("cats", str(opened.terms.copy)),
        "pattern": opened.tensors["stem/group"].numpy().tobytes()[:32],
        **{name: words.encode() for name, words in WORDS.items()},
    }
    written = {
        path: path.read_bytes()
        for path in sorted(tmp_path.rglob("*"))
        if path.is_file() and path.name not in WORDS
    }
    assert len(written) > 50
    for name, secret in secrets.items():
        assert not contains(shown.encode(), secret), name
        for path, data in written.items():
            assert not contains(data, secret), f"{name} in {path}"


def test_what_cannot_be_read_is_no_verdict(
    made: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, words in {"ours": OURS, "theirs": THEIRS}.items():
        (tmp_path / name).write_text(words)
    keys, folder, licence = made.root / "vendor", made.folder, made.file
    ours, theirs = ("--passphrase-file", tmp_path / "ours"), ("--passphrase-file", tmp_path / "theirs")
    none, nowhere = tmp_path / "none/none", tmp_path / "nowhere"
    (tmp_path / "utf-16").write_bytes(OURS.encode("utf-16"))
    new, clean = ("--keys", keys, "--name", "new"), ("--clean", made.root / "clean")
    weights = made.root / "initial.safetensors"
    give = ("issue", "cats-1", "--licensee", "Ada", "--vendor-passphrase-file", tmp_path / "ours", *theirs)
    look = ("--name", "cats-1", "--keys", keys, *ours)
    for command in (
        ("verify", folder, "--vendor", none),
        ("verify", folder, "--vendor", tmp_path / "ours"),
        ("verify", folder, "--licence", none, *theirs),
        ("verify", folder, "--licence", tmp_path, *theirs),
        ("verify", folder, "--licence", licence, "--passphrase-file", none),
        ("verify", folder, "--licence", licence, "--passphrase-file", tmp_path / "utf-16"),
        ("verify", none, "--vendor", keys),
        ("verify", licence, "--vendor", keys),
        ("train", none, "--test", folder, "--licence", licence, *theirs, "--out", nowhere),
        ("train", folder, "--test", none, "--licence", licence, *theirs, "--out", nowhere),
        ("train", folder, "--test", folder, "--licence", none, *theirs, "--out", nowhere),
        ("protect", none, *new, *ours, "--out", nowhere),
        ("protect", folder, "--keys", none, "--name", "new", *ours, "--out", nowhere),
        ("release", none, *new, *ours, "--weights", weights),
        ("release", folder, "--keys", none, "--name", "new", *ours, "--weights", weights),
        ("release", folder, *new, *ours, "--weights", none),
        ("release", folder, *new, *ours, "--weights", weights, "--recipe", none),
        ("release", folder, *new, *ours, "--weights", weights, "--audit", none),
        ("release", folder, *new, *ours, "--stem", "--clean", none),
        (*give, "--keys", none, "--out", nowhere),
        (*give, "--keys", keys, "--out", nowhere, "--copy", tmp_path / "c", "--protected", none, *clean),
        (
            *give,
            "--keys",
            keys,
            "--out",
            nowhere,
            "--copy",
            tmp_path / "c",
            "--protected",
            folder,
            "--clean",
            none,
        ),
        ("issue", "dogs", *give[2:], "--keys", keys, "--out", nowhere),
        ("trace", none, "--protected", folder, *look),
        ("trace", folder, "--protected", none, *look),
        ("trace", folder, "--protected", folder, "--name", "dogs", "--keys", keys, *ours),
    ):
        code = main([str(one) for one in ("license", *command)])
        assert code == 3, (command, code, capfd.readouterr().err)
        assert not nowhere.exists() and not (tmp_path / "c").exists()


def test_a_passphrase_is_the_first_line_of_a_file(tmp_path: Path) -> None:
    for content in (b"a b ", b"a b \n", b"a b \r\nc", b"\xef\xbb\xbfa b \nc"):
        (tmp_path / "words").write_bytes(content)
        assert read_passphrase(tmp_path / "words", "Passphrase") == "a b "
    (tmp_path / "words").write_text("a\u2028b\x0cc\n")  # no ends of lines, where they are typed
    assert read_passphrase(tmp_path / "words", "Passphrase") == "a\u2028b\x0cc"
    for nothing in (b"", b"\nsecond"):
        (tmp_path / "words").write_bytes(nothing)
        with pytest.raises(UsageError, match="got an empty one"):
            read_passphrase(tmp_path / "words", "Passphrase")


@pytest.mark.parametrize("verb", ["keygen", "protect", "release", "issue", "verify", "train", "trace"])
def test_every_verb_has_help(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["license", verb, "--help"]) == 0
    assert f"Usage: privet license {verb}" in capfd.readouterr().out


def test_errors_show_no_key(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something breaks that nobody foresaw, and the error's text is printed."""
    import traceback

    vendor = made.vendor

    def broken(*_: object, **__: object) -> None:
        raise LookupError("lost")

    monkeypatch.setattr(sys.modules["privet.licensing.release"], "measure", broken)  # not the function's
    from privet.licensing import StemPlan, release

    with pytest.raises(LookupError) as caught:
        release(made.folder, vendor, "x", "p", stem=StemPlan(), clean=made.root / "clean")
    text = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "vendor = Vendor(" in text
    for secret in (vendor._secret, vendor._signing):
        assert not contains(text.encode(), secret)

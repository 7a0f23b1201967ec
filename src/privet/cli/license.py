"""privet license: protect images for a release, sign it, issue licences, check both, train with one, trace a leak."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.markup import escape

from privet.cli.options import FILES, MACHINE, Files, Machine
from privet.cli.passphrase import read_passphrase
from privet.cli.screen import progress, say, written
from privet.errors import OK, UsageError

if TYPE_CHECKING:  # they import torch, which takes seconds
    from privet.images import ImageSet
    from privet.learning import Publication

license = App(
    name="license",
    help="Protect images for a release, sign it, issue licences, check both, train with one, trace a leaked copy.",
)


@license.command
def keygen(folder: Path, /, *, passphrase_file: Path | None = None) -> int:
    """Draw a vendor's keys: vendor.key, sealed with a passphrase and private, and vendor.pub for everybody.

    Parameters
    ----------
    folder
        New folder for the keys; later also for what licences are made of, and the ledger of licences.
    passphrase_file
        A file whose first line is the vendor's passphrase (default: asked for).
    """
    from privet.licensing import Vendor
    from privet.licensing.keys import key_id

    vendor = Vendor.create(
        folder, read_passphrase(passphrase_file, "New passphrase of the vendor", twice=True)
    )
    say(f"Keys written to {escape(str(folder))}; the vendor's public name is {key_id(vendor.public)}.")
    say("Keep vendor.key and its passphrase apart, each with a copy. Give vendor.pub to everybody.")
    return OK


@license.command
def protect(
    source: str,
    /,
    *,
    keys: Path,
    name: str,
    out: Path,
    method: str = "keyed-em",
    preset: str | None = None,
    epsilon: int | None = None,
    set: Annotated[list[str], Parameter(name="--set", negative="")] | None = None,
    seed: int = 0,
    passphrase_file: Path | None = None,
    files: Files = FILES,
    machine: Machine = MACHINE,
) -> int:
    """Add noise that the licence of a release takes away, and that networks without it learn instead of the images.

    A killed run goes on when the same command is given again, and ends with the same bytes.

    Parameters
    ----------
    source
        A folder of class folders, a .csv or .jsonl of paths and labels, Parquet, or a hub id.
    keys
        The vendor's folder; gets the surrogate, which must stay private.
    name
        Of the release that this will be: its key follows from it.
    out
        New folder for the protected images, manifest.jsonl and run.json.
    method
        keyed-em (noise that a keyed first layer takes away, in training and in use), lock (a pattern for each class,
        which licensees take off the training images by their labels) or uge (noise that aims to spare networks of keyed
        initial weights; no gap was measured).
    preset
        paper (needs a GPU) or cpu. Default: paper where there is a GPU, else cpu.
    epsilon
        Budget: no channel of a pixel changes by more, in 1/255. Default: 8.
    set
        Any other setting of the method, as NAME=VALUE; may be repeated. docs/methods.md lists them.
    seed
        The same seed and key give the same bytes.
    passphrase_file
        A file whose first line is the vendor's passphrase (default: asked for).
    files
        How images are read and written.
    machine
        Where it runs.
    """
    from privet.cli.protect import parse_settings
    from privet.licensing import Vendor
    from privet.licensing import protect as make
    from privet.licensing.protect import keyed_method

    settings = parse_settings(keyed_method(method), set or [], epsilon=epsilon)
    vendor = Vendor.open(keys, read_passphrase(passphrase_file, "Passphrase of the vendor"))
    here = machine.find()
    preset = preset or ("paper" if here.device.type == "cuda" else "cpu")

    def change(images: ImageSet, **writing: Any) -> Publication:
        return make(
            images,
            vendor,
            name,
            out,
            method=method,
            preset=preset,
            settings=settings,
            runtime=here,
            seed=seed,
            **writing,
        )

    return files.change(source, out, change, rank=here.rank, what=f"protected for {escape(name)}")


@license.command
def release(
    folder: Path,
    /,
    *,
    keys: Path,
    name: str,
    stem: bool = False,
    stem_group: int = 4,
    stem_tile: int = 8,
    stem_grey: bool = False,
    lock: Annotated[bool, Parameter(negative="")] = False,
    clean: str | None = None,
    weights: Path | None = None,
    recipe: Path | None = None,
    audit: Path | None = None,
    passphrase_file: Path | None = None,
) -> int:
    """Make a release of a folder of protected files: sign what is in it, and commit to what licences will hold.

    Parameters
    ----------
    folder
        What was protected; gets release.json.
    keys
        The vendor's folder.
    name
        Of the release, never used for other images: its keys follow from it.
    stem
        The release has a keyed stem, though its files are not from `privet license protect`, which says so itself.
        In either case it is checked that the stem fits.
    stem_group
        Values in a group of the stem.
    stem_tile
        Side of the stem's tile, in pixels.
    stem_grey
        The stem moves the channels together; for grey files.
    lock
        Each class was changed by one pattern, by other means than `privet license protect --method lock`, whose files
        say so themselves; licences hold the patterns.
    clean
        The originals, for the check of the stem or the lock; needed where there is one.
    weights
        Secret initial weights, as a file that privet saved. Default: none, or what
        `privet license protect --method uge` left in the vendor's folder.
    recipe
        A JSON file with settings for training (architecture, epochs, learning_rate, ...).
    audit
        The report.json of these files' audit; its hash is signed with the rest.
    passphrase_file
        A file whose first line is the vendor's passphrase (default: asked for).
    """
    from privet.files import read_json
    from privet.licensing import StemPlan, Vendor
    from privet.licensing import release as make

    passphrase = read_passphrase(passphrase_file, "Passphrase of the vendor")
    vendor = Vendor.open(keys, passphrase)
    with progress() as listener:
        manifest = make(
            folder,
            vendor,
            name,
            passphrase,
            stem=StemPlan(group=stem_group, tile=stem_tile, grey=stem_grey) if stem else None,
            lock=lock,
            clean=clean,
            weights=weights,
            recipe=read_json(recipe) if recipe else None,
            audit=audit,
            progress=listener,
        )
    say(f"Release {escape(name)}: {len(manifest.files):,} files signed, root {manifest.merkle_root[:16]}.")
    if audit is None:
        say("It names no audit: nobody has measured who learns from it.")
    return OK


@license.command
def issue(
    name: str,
    /,
    *,
    keys: Path,
    licensee: str,
    out: Path,
    expires: str | None = None,
    copy: Path | None = None,
    protected: Path | None = None,
    clean: str | None = None,
    vendor_passphrase_file: Path | None = None,
    passphrase_file: Path | None = None,
) -> int:
    """Write a licensee's licence and, with --copy, a copy of the files that can be traced to them.

    The licence is written last. A killed run goes on when the same command is given again.

    Parameters
    ----------
    name
        Of the release.
    keys
        The vendor's folder.
    licensee
        Who gets it.
    out
        The licence file to write; mode 0600.
    expires
        Last day, YYYY-MM-DD, not one that is over. privet refuses the licence after it; nothing else can.
    copy
        New folder for the licensee's own fingerprinted copy; needs --protected and --clean.
    protected
        The release's folder, not a licensee's copy of it.
    clean
        The originals, around which the budget is kept.
    vendor_passphrase_file
        A file whose first line is the vendor's passphrase (default: asked for).
    passphrase_file
        A file whose first line shall open the licence (default: asked for).
    """
    from privet.licensing import CopyPlan, Vendor
    from privet.licensing import issue as make

    plan = None
    if copy is not None:
        if protected is None or clean is None:
            raise UsageError(
                "A copy is made of the release's folder and the originals: give --protected and --clean."
            )
        from privet.learning import Runtime

        here = Runtime.find("cpu", "float32")
        here.alone("privet license issue")
        plan = CopyPlan(out=copy, protected=protected, clean=clean, runtime=here)
    vendor_passphrase = read_passphrase(vendor_passphrase_file, "Passphrase of the vendor")
    vendor = Vendor.open(keys, vendor_passphrase)
    passphrase = read_passphrase(passphrase_file, f"New passphrase for {licensee}", twice=True)
    with progress() as listener:
        issued = make(
            vendor,
            name,
            vendor_passphrase,
            licensee=licensee,
            passphrase=passphrase,
            out=out,
            expires=expires,
            copy=plan,
            progress=listener,
        )
    say(f"Licence of {escape(licensee)} for {escape(name)} written to {escape(str(out))}")
    if issued.copy is None:
        return OK
    return written(issued.copy, f"fingerprinted as copy {issued.licence.terms.copy}", rank=0)


@license.command
def verify(
    folder: Path,
    /,
    *,
    vendor: Path | None = None,
    licence: Path | None = None,
    passphrase_file: Path | None = None,
) -> int:
    """Check that a release is what its vendor signed, and that a licence belongs to it and has not expired.

    Parameters
    ----------
    folder
        The release.
    vendor
        The vendor's vendor.pub; may be left out with a licence, which holds it.
    licence
        The licence to check.
    passphrase_file
        A file whose first line opens the licence (default: asked for).
    """
    from privet.licensing import read_licence, read_public
    from privet.licensing import verify as check

    public = read_public(vendor) if vendor else None
    opened = None
    if licence is not None:
        opened = read_licence(
            licence, read_passphrase(passphrase_file, "Passphrase of the licence"), public=public
        )
    with progress() as listener:
        found = check(folder, public=public, licence=opened, progress=listener)
    manifest = found.manifest
    say(f"{len(manifest.files):,} files ({found.images:,} images) are as the vendor signed them.")
    if opened is not None:
        until = f"until {opened.terms.expires}" if opened.terms.expires else "without a last day"
        say(f"The licence of {escape(opened.terms.licensee)} holds for {escape(manifest.release)} {until}.")
    if manifest.audit is None:
        say("The release names no audit: nobody has measured who learns from it.")
    return OK


@license.command
def train(
    folder: Path,
    /,
    *,
    test: str,
    licence: Path,
    out: Path,
    vendor: Path | None = None,
    passphrase_file: Path | None = None,
    seed: int = 0,
    machine: Machine = MACHINE,
) -> int:
    """Check a release and a licence, then train with the licence's recipe, on unlocked files.

    A killed run goes on when the same command is given again.

    Parameters
    ----------
    folder
        The release.
    test
        Clean images of the same classes.
    licence
        The licence for this release.
    out
        New folder for learner.safetensors and run.json.
    vendor
        The vendor's vendor.pub (default: the key in the licence).
    passphrase_file
        A file whose first line opens the licence (default: asked for).
    seed
        The same seed gives the same network.
    machine
        Where it runs.
    """
    from privet.licensing import read_licence, read_public
    from privet.licensing import train as work

    public = read_public(vendor) if vendor else None
    opened = read_licence(
        licence, read_passphrase(passphrase_file, "Passphrase of the licence"), public=public
    )
    here = machine.find()
    with progress(here.rank) as listener:
        learned = work(folder, test, opened, out, runtime=here, public=public, seed=seed, progress=listener)
    if here.rank == 0:
        behind = ", behind the licence's stem" if opened.stem else ""
        say(
            f"{learned.accuracy:.1%} on clean images after the last epoch{behind}. Written to {escape(str(out))}"
        )
    return OK


@license.command
def trace(
    leaked: str,
    /,
    *,
    protected: Path,
    keys: Path,
    name: str,
    false_accusations: float = 1e-6,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    passphrase_file: Path | None = None,
) -> int:
    """Say from whose copy leaked images come, and how probable a false accusation is at most.

    Parameters
    ----------
    leaked
        Images that were found, under whatever names: a folder of them, however they lie there, or one file.
    protected
        The release's folder with its release.json: the files before any copy was marked.
    keys
        The vendor's folder.
    name
        Of the release.
    false_accusations
        The probability of accusing anybody innocent that is accepted.
    as_json
        Print JSON.
    passphrase_file
        A file whose first line is the vendor's passphrase (default: asked for).
    """
    from privet.licensing import Vendor, find_leak

    passphrase = read_passphrase(passphrase_file, "Passphrase of the vendor")
    vendor = Vendor.open(keys, passphrase)
    with progress() as listener:
        found = find_leak(
            leaked,
            protected,
            vendor,
            name,
            passphrase,
            false_accusations=false_accusations,
            progress=listener,
        )
    if as_json:
        rows = [
            {
                "licensee": licensee,
                "copy": suspect.copy,
                "score": suspect.score,
                "false_accusation": suspect.false_accusation,
                "guilty": suspect.guilty,
            }
            for licensee, suspect in found
        ]
        sys.stdout.write(json.dumps(rows, ensure_ascii=False) + "\n")
        return OK
    guilty = [(licensee, suspect) for licensee, suspect in found if suspect.guilty]
    for licensee, suspect in guilty:
        say(
            f"{escape(licensee)} (copy {suspect.copy}): score {suspect.score:.1f}; were they innocent, this would "
            f"happen with a probability of at most {suspect.false_accusation:.1e}."
        )
    if not guilty:
        say(f"No copy can be named: {len(found)} compared, highest score {found[0][1].score:.1f}.")
    return OK

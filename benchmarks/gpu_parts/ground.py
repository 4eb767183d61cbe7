"""What is brought along to a machine without a network: wheels that it may lack, and the text that is trained on."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # commands of the parts have other working folders
HOME = Path("benchmarks/.gpu")  # ignored by git; relative, since shards name their text as it was asked for
WHEELS = HOME / "wheels"
MOST_WHEELS, MOST_TEXT = 20_000_000, 50_000_000  # bytes
PYTHONS = ("3.11", "3.12", "3.13")  # that the machine may have
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
             "manylinux1_x86_64")  # fmt: skip
# Asked for without what they need in turn, which is numpy and torch again; so all are named.
PACKAGES = ("pydantic", "pydantic_core", "annotated-types", "typing-extensions", "typing-inspection", "typer", "click",
            "rich", "markdown-it-py", "mdurl", "pygments", "shellingham", "annotated-doc", "pyyaml", "safetensors",
            "jinja2", "markupsafe")  # fmt: skip
TOKENIZER = ("tokenizer.vocab_size=50304", "tokenizer.pattern=gpt-2")
READ = 45_000_000  # bytes of Wikipedia's text


def prepared() -> Path | None:
    """The folder of text and shards, where it was made."""
    return HOME if (ROOT / HOME / "shards" / "manifest.json").is_file() else None


def sources() -> list[str]:
    """The keys that name them to a run."""
    return [f"data.train={HOME / 'text.txt.gz'}", f"data.eval={HOME / 'unseen.txt'}", f"data.shards={HOME / 'shards'}"]


def bring_wheels() -> None:
    """Downloads the wheels; raises RuntimeError where they come to more than they may."""
    target = ROOT / WHEELS
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    pinned = pins()
    names = [
        f"{name}=={pinned[key]}" if (key := name.lower().replace("_", "-")) in pinned else name for name in PACKAGES
    ]
    where = [part for platform in PLATFORMS for part in ("--platform", platform)]
    for python in PYTHONS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--python-version", python, "--implementation", "cp", *where,
                   "-d", str(target)]  # fmt: skip
        subprocess.run([*command, *names], check=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{len(list(target.iterdir()))} wheels, {size / 1e6:.1f} MB, in {WHEELS}")
    if size > MOST_WHEELS:
        raise RuntimeError(f"the wheels are {size / 1e6:.1f} MB, more than {MOST_WHEELS / 1e6:.0f}")


def pins() -> dict[str, str]:
    """The versions that the project is tested with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def add_wheels() -> None:
    """Unpacks the wheels that were brought along, of packages that are missing here, and adds them to the path."""
    import importlib.util
    import zipfile

    here = ROOT / WHEELS
    complete = importlib.util.find_spec("pydantic") is not None
    if not here.is_dir() or (complete and importlib.util.find_spec("typer")):
        return
    site = ROOT / HOME / "site"
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for wheel in sorted(here.glob("*.whl")):
        name, kind = wheel.name.split("-")[0].lower(), wheel.name.split("-")[2]
        module = {"pyyaml": "yaml", "markdown_it_py": "markdown_it"}.get(name, name)
        together = name in ("pydantic", "pydantic_core", "typing_extensions") and not complete
        if (importlib.util.find_spec(module) and not together) or not (
            kind in (own, "py3", "py2.py3") or "abi3" in wheel.name
        ):
            continue  # what is there is left as it is, but for what has to fit together
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))


def make_text() -> None:
    """Makes the text and its shards, of Wikipedia where `GPTWORKS_DATA` has it, else of the package's own texts."""
    home = ROOT / HOME
    home.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(home / "shards", ignore_errors=True)
    data = Path(os.environ.get("GPTWORKS_DATA", "")) / "enwiki"
    if os.environ.get("GPTWORKS_DATA") and (data / "enwiki_100mb.txt").is_file():
        with open(data / "enwiki_100mb.txt", "rb") as file:
            text = file.read(READ).rpartition(b"\n\n")[0]
        with open(data / "enwiki_val_5mb.txt", "rb") as file:
            unseen = file.read(1_000_000).rpartition(b"\n\n")[0]
    else:
        own = ROOT / "gptworks/data/texts"
        texts = [(own / name).read_bytes() for name in ("shakespeare.txt", "hongloumeng.txt")]
        begins = [
            each[: len(each) * 9 // 10].rpartition(b"\n")[0] for each in texts
        ]  # the last tenth of each is unseen
        text = b"\n".join(begins)
        unseen = b"\n".join(each[len(begin) + 1 :] for each, begin in zip(texts, begins, strict=True))
    (home / "text.txt.gz").write_bytes(gzip.compress(text, 6, mtime=0))
    (home / "unseen.txt").write_bytes(unseen)
    from gptworks.core.config import load
    from gptworks.data.shards import prepare

    config = load("gpt2_124m", [*sources(), *TOKENIZER])
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        shards = prepare(config.data, config.tokenizer, Path(HOME / "shards"))
    finally:
        os.chdir(before)
    size = sum(file.stat().st_size for file in home.rglob("*") if file.is_file() and WHEELS.name not in file.parts)
    print(f"{len(shards.train.tokens):,} ids of {len(text) / 1e6:.0f} MB of text; {size / 1e6:.1f} MB in {HOME}")
    if size > MOST_TEXT:
        raise RuntimeError(f"text and shards are {size / 1e6:.1f} MB, more than {MOST_TEXT / 1e6:.0f}")


STEPS = {"wheels": bring_wheels, "text": make_text}

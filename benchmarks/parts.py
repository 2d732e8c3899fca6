"""Files in parts of a bounded size, for a machine that takes only so much at a time and has no network.

    python benchmarks/parts.py pack FILE_OR_FOLDER … -o PARTS [--mib 30]
    python benchmarks/parts.py unpack PARTS -o FOLDER

The parts are consecutive pieces of one .tar.xz; `parts.json` names them with their SHA-256, which `unpack` compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from pathlib import Path
from typing import Annotated

import typer

ARCHIVE, TABLE = "parts.tar.xz", "parts.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def pack(sources: list[Path], out: Path, mib: float) -> list[Path]:
    """Write files and folders, by their last names, as parts of at most `mib` MiB; returns the parts."""
    out.mkdir(parents=True, exist_ok=True)
    archive, size = out / ARCHIVE, int(mib * 2**20)
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for source in sources:
            tar.add(source, arcname=source.name, filter=_plain)
    parts = []
    with open(archive, "rb") as file:
        while piece := file.read(size):
            parts.append(out / f"part-{len(parts):02d}")
            parts[-1].write_bytes(piece)
    archive.unlink()
    sums = {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}
    (out / TABLE).write_text(json.dumps(sums, indent=1) + "\n")
    return parts


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def unpack(parts: Path, out: Path) -> None:
    """Join parts and unpack them into a folder.

    Raises:
        SystemExit: if a part is missing or damaged.
    """
    sums = json.loads((parts / TABLE).read_text())
    out.mkdir(parents=True, exist_ok=True)
    archive = out / ARCHIVE
    with open(archive, "wb") as file:
        for name, wanted in sums.items():
            part = parts / name
            if not part.is_file():
                sys.exit(f"{part}: missing")
            data = part.read_bytes()
            if hashlib.sha256(data).hexdigest() != wanted:
                sys.exit(f"{part}: damaged, send it again")
            file.write(data)
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    archive.unlink()


@app.command("pack")
def pack_command(
    sources: Annotated[list[Path], typer.Argument(help="Files and folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the parts.")],
    mib: Annotated[float, typer.Option(help="Size of a part.")] = 30,
) -> None:
    """Write parts."""
    for part in pack(sources, out, mib):
        print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")


@app.command("unpack")
def unpack_command(
    parts: Annotated[Path, typer.Argument(help="Folder of the parts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to unpack into.")],
) -> None:
    """Join parts and unpack them."""
    unpack(parts, out)


if __name__ == "__main__":
    app()

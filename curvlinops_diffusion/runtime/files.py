"""Files that are never half-written, and one format of tensors with a header of JSON text."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # to say what a file holds, PyTorch need not be imported
    from torch import Tensor


VERSION = 1  # of the format of all files of tensors; raise it with every change of what they hold


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file whole, or not at all.

    Raises:
        ValueError: If it cannot be written; an older file of that name is unchanged.
    """
    write_whole(path, lambda temporary: Path(temporary).write_bytes(contents))


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write a file by a function of a name under another one in the same folder, then rename it.

    Raises:
        ValueError: If it cannot be written; an older file of that name is unchanged.
    """
    check_file_name(path)
    path = _behind_links(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as new:
            permissions = os.fstat(new.fileno()).st_mode  # those of the user's new files
    except OSError as error:
        raise ValueError(f"'{path.parent}' cannot be written to: {error}.") from error
    try:
        write(str(temporary))
        os.chmod(temporary, permissions)  # a writer may have replaced the file by a private one
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # the name must not appear before the contents
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"'{path}' could not be written: {error}. An older file of that name is unchanged."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_file_name(path: Path, suffix: str = "") -> None:
    """Check, before what it is to hold is computed, that a file may have a name."""
    if not path.name.endswith(suffix):
        raise ValueError(f"The name of a file must end in {suffix}, got '{path}'.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder '{path.parent}' does not exist. Create it first.")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder. Pass the name of a file.")


def make_folder(path: Path) -> None:
    """Make a folder where there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The folder '{path}' cannot be made: {error}. Pass another one."
        ) from error


def named_path(text: str) -> tuple[str | None, Path]:
    """Split ``name=path`` into name and path; the name is ``None`` for a path alone.

    A path may hold an equals sign, too: what exists, or begins as paths do, is one.
    """
    name, equals, path = text.partition("=")
    alone = not equals or text[0] in "~$/." or os.path.exists(text)
    return (None, Path(text)) if alone else (name, Path(path))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, through links, each folder once."""
    seen: set[str] = set()
    for found, folders, files in os.walk(folder, followlinks=True):
        if (here := os.path.realpath(found)) in seen:  # a link to a folder around it
            folders.clear()
        else:
            seen.add(here)
            yield from (Path(found) / name for name in files)


def check_can_be_made(path: Path, option: str) -> None:
    """Check that a folder is there and can be written to, or that it can be made."""
    try:
        there = _existing(path)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be made: {error.strerror}.") from error
    if not there.is_dir():
        raise ValueError(f"{option} {path} cannot be a folder: '{there}' is a file.")
    check_can_be_written(there / "file", option)


def check_can_be_written(path: Path, option: str) -> None:
    """Check that a file of a name can be written, by writing an empty one beside it.

    Permissions alone do not tell: a disk may be read-only, and a name may be too long.
    """
    path = _behind_links(path)
    temporary = _temporary(path)
    try:
        temporary.open("xb").close()
        temporary.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The folder '{path.parent}' of {option} cannot be written to, not by the name of "
            f"'{path.name}': {reason}."
        ) from error


def _existing(path: Path) -> Path:
    """Return the innermost folder, or file, on the way to a path that exists."""
    return next(there for there in (path.absolute(), *path.absolute().parents) if there.exists())


def _behind_links(path: Path) -> Path:
    """Return the file that a link leads to, so that the link is not replaced."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{token_hex(4)}")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Check that a disk has room for so many bytes in a folder, which need not exist yet."""
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ValueError(
            f"{what} take {needed / 1e9:,.3g} GB, and {free / 1e9:,.3g} GB are free in '{folder}'. "
            "Make room, or choose another place."
        )


# entries of a file's metadata: a digest of header and tensors, and the format's version
_DIGEST, _FORMAT_VERSION = "sha256", "format_version"
# safetensors takes no more than 100 MB of metadata: longer headers are kept as a tensor of bytes
_LONGEST = 50_000_000
_LONG_HEADER = "__header__"


def _file_digest(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Compute the digest of header and tensors, in the order of their names."""
    from curvlinops_diffusion.runtime.digests import tensor_parts

    digest = sha256(header.encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        for part in tensor_parts(tensor):
            digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileKind:
    """A kind of safetensors file: tensors, and a header of JSON text.

    Nothing in a file is ever executed.

    Attributes:
        key: Under which the header is kept among the file's metadata.
        what: What the file is of, for messages.
        advice: What to do about a file that cannot be read, for messages.
        version: The format's version; files of another one are refused. ``None`` for any.
    """

    key: str
    what: str
    advice: str
    version: int | None = VERSION

    def write(self, path: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
        """Write a file under another name in the same folder, then rename it.

        Raises:
            ValueError: If it cannot be written; an older file of that name is unchanged.
        """
        import torch
        from safetensors.torch import save_file

        needed = sum(tensor.nbytes for tensor in tensors.values())
        check_space(path.parent, needed, f"The numbers of '{path.name}'")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        memory: set[int] = set()
        for name, z in plain.items():  # the format refuses tensors that share memory
            if z.untyped_storage().nbytes() > z.nbytes or z.untyped_storage().data_ptr() in memory:
                plain[name] = z.clone()
            memory.add(plain[name].untyped_storage().data_ptr())
        text = json.dumps(header)
        metadata = {self.key: text}
        if len(text) > _LONGEST:  # the names of a million images
            plain[_LONG_HEADER] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            metadata[self.key] = json.dumps(None)
        if self.version is not None:
            metadata[_FORMAT_VERSION] = str(self.version)
        metadata[_DIGEST] = _file_digest(metadata[self.key], sorted(plain.items()))
        write_whole(path, lambda temporary: save_file(plain, temporary, metadata))

    def read(
        self, path: Path, wanted: Container[str] | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Read the header and the tensors of a file.

        Args:
            path: The file.
            wanted: The names of the tensors that are kept; ``None`` for all. The others are read
                as well, to see that the file is as it was written.

        Raises:
            ValueError: If the file is missing, damaged, or of another kind or version.
        """
        with self._open(path, framework="pt") as file:
            header = self._header(path, file)
            tensors: dict[str, Tensor] = {}

            def each() -> Iterator[tuple[str, Tensor]]:
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name)
                    if (wanted is None or name in wanted) and name != _LONG_HEADER:
                        tensors[name] = tensor
                    yield name, tensor

            metadata = file.metadata()
            try:
                found = _file_digest(metadata[self.key], each())
            except (SafetensorError, OSError) as error:
                raise self._not_whole(path, error) from error
        if metadata.get(_DIGEST) != found:
            raise ValueError(
                f"'{path}' is damaged: its numbers are not those that were written. {self.advice}"
            )
        return header, tensors

    def read_header(self, path: Path) -> Any:
        """Read the header alone."""
        with self._open(path) as file:
            return self._header(path, file)

    def read_rows(self, path: Path, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, without the others and the file's digest."""
        with self._open(path, framework="pt") as file:
            self._check_version(path, file.metadata() or {})
            try:
                found: Tensor = file.get_slice(name)[rows]
            except (SafetensorError, OSError) as error:
                raise self._not_whole(path, error) from error
        return found

    def names(self, path: Path) -> set[str]:
        """Read the names of the tensors."""
        with self._open(path) as file:
            self._header(path, file)
            return set(file.keys()) - {_LONG_HEADER}

    def holds(self, path: Path) -> bool:
        """Tell whether a file can be read, and is of this kind."""
        try:
            with self._open(path) as file:
                return self.key in (file.metadata() or {})
        except ValueError:
            return False

    def damaged(self, path: Path, reason: object) -> ValueError:
        """Make an error that says that the header is not what it should be."""
        return ValueError(f"The header of '{path}' is damaged ({reason}). {self.advice}")

    def _open(self, path: Path, framework: str = "np") -> Any:
        if path.is_dir():
            raise ValueError(f"'{path}' is a folder, not a file of {self.what}. {self.advice}")
        if not path.is_file():
            raise ValueError(f"There is no file '{path}'. {self.advice}")
        try:
            return safe_open(path, framework)
        except (SafetensorError, OSError) as error:
            raise self._not_whole(path, error) from error

    def _header(self, path: Path, file: Any) -> Any:
        metadata = file.metadata() or {}
        if self.key not in metadata:
            other = _kind_among(metadata)
            held = f", but of kind '{other}'" if other else ""
            raise ValueError(
                f"'{path}' is a safetensors file, but not of {self.what}{held}. {self.advice}"
            )
        self._check_version(path, metadata)
        try:
            header = json.loads(metadata[self.key])
            if header is None and _LONG_HEADER in file.keys():  # noqa: SIM118 - no mapping
                raw = file.get_tensor(_LONG_HEADER)  # an array, or a tensor
                header = json.loads(bytes(memoryview(getattr(raw, "numpy", lambda: raw)())))
            return header
        except (ValueError, RecursionError) as error:
            raise self.damaged(path, error) from error

    def _check_version(self, path: Path, metadata: Mapping[str, str]) -> None:
        version = metadata.get(_FORMAT_VERSION)
        if self.version is not None and version != str(self.version):
            raise ValueError(
                f"'{path}' has the format version {version}, and this curvlinops_diffusion reads "
                f"{self.version}. Install the one that wrote it, or make it anew: {self.advice}"
            )

    def _not_whole(self, path: Path, error: Exception) -> ValueError:
        return ValueError(
            f"'{path}' is not a whole safetensors file ({error}). It was truncated, damaged, or "
            f"written by another program. {self.advice}"
        )


def kind_of(path: Path) -> str | None:
    """Return the key of a file's kind: empty of other programs', ``None`` if it is not whole."""
    try:
        with safe_open(path, "np") as file:
            return _kind_among(file.metadata() or {})
    except (SafetensorError, OSError):
        return None


def _kind_among(metadata: Mapping[str, str]) -> str:
    return next((key for key in metadata if key.startswith("curvlinops_diffusion.")), "")


def check_same(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    what: str,
    advice: str,
    error: type[ValueError] = ValueError,
) -> None:
    """Check that what a file was made of, as plain values, is what is here.

    Args:
        there: How the file was made.
        here: How it would be made here.
        what: A sentence up to the differences, without a colon.
        advice: What to do, a sentence.
        error: The kind of error.
    """
    if different := _differences(there, here):
        raise error(f"{what}: {'; '.join(different[:5])}. {advice}")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List where two identities differ, as ``name (value there, value here)``."""
    found = []
    for key in sorted({*there, *here}):
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            short = [str(v)[:12] + "…" if len(str(v)) > 24 else str(v) for v in (a, b)]
            found.append(f"{prefix}{key} ({short[0]} there, {short[1]} here)")
    return found

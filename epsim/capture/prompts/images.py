"""Pictures that are opened when they are needed: `ImageSource`, and one in a file, `ImageFile`."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from epsim.errors import InputError

MAX_ASPECT = 100  # the short side is scaled up to the model's image size, the long one with it
_DEEP_MODES = ("I", "F")  # and I;16: pillow clips them to 8 bits, which makes them white


class ImageError(InputError):
    """A picture is missing, damaged or of a kind that is not read: name or write another file."""


class ImageSource(Protocol):
    """A picture that takes no memory until it is opened."""

    @property
    def identity(self) -> str:
        """Text that changes with the pixels."""

    def open(self) -> Image.Image:
        """Return the picture, RGB; raises ImageError."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A picture in a file of any format that pillow reads; of an animation the first frame.

    Attributes:
        path: of the file.
        sha256: of its bytes when it was checked.
    """

    path: Path
    sha256: str

    @staticmethod
    def check(path: Path) -> "ImageFile":
        """Read and decode the file at `path` once; raises ImageError if it is not a whole picture."""
        content = _read(path)
        _decode(path, content, preview=True)
        return ImageFile(path=path, sha256=hashlib.sha256(content).hexdigest())

    @property
    def identity(self) -> str:
        """The hash of the file's bytes."""
        return self.sha256

    def open(self) -> Image.Image:
        """Return the picture as RGB, turned as its EXIF says; raises ImageError if the file has changed since."""
        content = _read(self.path)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ImageError(f'image "{self.path}": changed after it was checked; start again with files that stay')
        return _decode(self.path, content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f'image "{path}": {error.strerror}; write the path of a picture') from error
    except ValueError as error:  # a zero byte in the path
        raise ImageError(f"image {str(path)!r}: {error}; write the path of a picture") from error


def _decode(path: Path, content: bytes, *, preview: bool = False) -> Image.Image:
    """Return the picture as RGB; preview: a JPEG at an eighth of its size, which still reads the whole file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata and palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                _require_plain(path, image)
                if preview:
                    image.draft("RGB", (1, 1))
                return ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f'image "{path}": is not a picture that can be read; write e.g. a PNG or JPEG file') from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ImageError(f'image "{path}": has more than {limit} million pixels; make it smaller') from error
    except Exception as error:  # a decoder raises anything on damaged data
        raise ImageError(f'image "{path}": is damaged ({error}); write it again') from error


def _require_plain(path: Path, image: Image.Image) -> None:
    if image.mode.split(";")[0] in _DEEP_MODES:
        raise ImageError(f'image "{path}": has more than 8 bits per channel ({image.mode}); write it with 8')
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise ImageError(
            f'image "{path}": {image.width} x {image.height} pixels; '
            f"the long side must be at most {MAX_ASPECT} times the short one: crop it"
        )

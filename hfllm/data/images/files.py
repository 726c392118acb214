"""Read an image from a path, bytes or PIL into RGB, and refuse an unreadable one in a line with its name.

The result is RGB: palettes, gray, 16 bits and CMYK are converted, transparent parts lie on white, and images are
turned as the camera was held. Of an animation the first frame is read.
"""

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import BadRow
from hfllm.errors import one_line
from hfllm.fingerprint import ORIENTATION

if TYPE_CHECKING:
    from PIL.Image import Image

# An image of more pixels is refused: in RGB it takes 120 MB, and models see it much smaller.
MAX_PIXELS = 40_000_000
# Sides of one pixel belong to broken downloads and to marks that count visitors.
MIN_SIDE = 2
# Letters of an image's name in an error.
MOST_SHOWN = 200
# How to turn an image by its camera's entry (the EXIF tag Orientation): `PIL.Image.Transpose`, by its name.
TURNS = {
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"},
    **{7: "TRANSVERSE", 8: "ROTATE_90"},
}
# Supported formats. Of Pillow's other formats some are handed to another program (EPS to Ghostscript, which runs the
# code in it), and some hold a file of any other format (IPTC).
FORMATS = (
    *("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA", "DDS", "AVIF"),
    *("JPEG2000", "PSD"),
)
OTHER_FORMAT = f"no picture in a format that is read: {', '.join(FORMATS)}"
UNREADABLE = "with a picture that cannot be read"


class BadImage(BadRow):
    """An unreadable image; `--bad_images drop` leaves its row out."""

    def __init__(self, message: str):
        super().__init__(message, UNREADABLE)


def read_image(
    value: Any, origin: str, folder: Path | None = None, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> "Image":
    """Return an image in RGB, wholly decoded.

    Args:
        value: a path, bytes, a PIL image, a `data:` address, or a dictionary with `bytes` or `path`.
        origin: the row, for errors.
        folder: the base of relative paths.
        max_pixels: width times height at most, known before anything is decoded.
        min_side: the shorter side at least.

    Raises:
        BadImage: in one line with the row and the file, when it cannot be read or is too large or too small.
    """
    from PIL import Image, UnidentifiedImageError

    where = f"{origin}: picture in memory"
    try:
        if isinstance(value, Image.Image):
            # An opened one may not have been read yet.
            if value.format is not None and value.format not in FORMATS:
                raise BadImage(f"{where}, {value.format}: {OTHER_FORMAT}")
            return _checked(value, where, max_pixels, min_side)
        source, name = _source(value, origin, folder)
        where = f"{origin}: picture {name}"
        with warnings.catch_warnings():
            # Pillow warns of more pixels than it likes, and we have a limit of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            # MPO is opened as JPEG, and has no opener of its own.
            with Image.open(source, formats=[each for each in FORMATS if each in Image.OPEN]) as opened:
                return _checked(opened, where, max_pixels, min_side)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        most = min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)
        raise BadImage(f"{where}: more pixels than {most:,}, the most that are read") from None
    except UnidentifiedImageError:
        raise BadImage(f"{where}: {OTHER_FORMAT}") from None
    except Exception as error:  # of broken files Pillow's decoders raise any exception
        raise BadImage(f"{where}: cannot be read: {_first_line(error)}") from None


def path_of(value: Any) -> str | None:
    """Return the path named by an image, as `read_image` would open it; `None` where it names no local file."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        value = value.get("path") if content is None else content
    if not isinstance(value, str | Path) or not str(value):
        return None
    return None if "://" in str(value) or str(value).startswith("data:") else str(value)


def _source(value: Any, origin: str, folder: Path | None) -> tuple[Any, str]:
    """Return Pillow's input, and the name of the image in errors."""
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), (bytes, bytearray)):
            return io.BytesIO(value["bytes"]), _shown(value.get("path") or "in bytes")
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (bytes, bytearray)):
        return io.BytesIO(value), f"of {len(value):,} bytes"
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(value.partition(",")[2], validate=True)), "in a data: address"
        except (binascii.Error, ValueError):
            raise BadImage(f"{origin}: picture in a data: address: not base64") from None
    if isinstance(value, str) and "://" in value:
        advice = "nothing is downloaded here; save it as a file and name its path"
        raise BadImage(f"{origin}: picture {_shown(value)}: {advice}")
    if not isinstance(value, (str, Path)) or not str(value):
        raise BadImage(f"{origin}: a picture must be a path, bytes or a PIL image, got {str(value)[:60]!r}")
    path = Path(folder or "", value)
    # The system may refuse to look for something other than a name, such as base64 without `data:`.
    with suppress(OSError):
        if path.is_file():
            return path, _shown(path)
    raise BadImage(f"{origin}: picture {_shown(path)}: no such file")


def _shown(name: str | Path) -> str:
    """Return a name in its form for a line of an error."""
    name = one_line(name, None)
    return name if len(name) <= MOST_SHOWN else f"{name[:MOST_SHOWN]}..."


def _checked(image: "Image", where: str, max_pixels: int, min_side: int) -> "Image":
    _check_size(image, where, max_pixels, min_side)
    if image.tell():
        image.seek(0)
    image.load()
    # Some files hold an image of another size than the stated one.
    _check_size(image, where, max_pixels, min_side)
    return to_rgb(image)


def _check_size(image: "Image", where: str, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"{where}: {width} x {height} pixels; at most {max_pixels:,} are read")
    if min(width, height) < min_side:
        raise BadImage(f"{where}: {width} x {height} pixels; each side must have at least {min_side}")


def image_key(value: Any) -> str:
    """Return a value that is equal for equal images, as rows hold them: the path, or a hash of the bytes."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if hasattr(value, "tobytes"):
        value = value.tobytes()
    return hashlib.sha256(value).hexdigest() if isinstance(value, (bytes, bytearray)) else str(value)


def to_rgb(image: "Image") -> "Image":
    """Return a copy in RGB, upright, of its first frame; transparent parts lie on white."""
    import numpy
    from PIL import Image

    if image.tell():
        image.seek(0)
    image.load()
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut 16 bits off at 255; some formats have them in 32, and others no more than 8 of them.
        values = numpy.asarray(image)
        values = values >> 8 if values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(numpy.uint8))
    elif image.mode == "F":
        # Of floats the range gives the scale: Pillow would cut values from 0 to 1 to black.
        values = numpy.nan_to_num(numpy.asarray(image), posinf=255, neginf=0)
        values = values * 255 if values.max(initial=0) <= 1 else values
        image = Image.fromarray(values.clip(0, 255).round().astype(numpy.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: "Image") -> "Image":
    """Return an image turned as its camera was held.

    Pillow's `exif_transpose` would write all other tags again, and fail at the first that it cannot write.
    """
    from PIL.Image import Transpose

    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # unreadable tags say nothing of the pixels
        turn = None
    return image if turn is None else image.transpose(Transpose[turn])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]

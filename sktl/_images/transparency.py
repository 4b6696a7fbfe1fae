"""Transparent pixels of image files that Pillow reads differently from browsers.

The pixels of a GIF canvas that its first frame does not cover are transparent. Pillow
fills them with the first color of the palette if the frame has no transparent color.

A BMP file with an alpha mask whose alpha is zero everywhere is opaque: many programs
write the mask, but not the alpha.
"""

from PIL import Image


def correct_transparency(image: Image.Image) -> Image.Image:
    """Return an image with the transparency that browsers show.

    Parameters
    ----------
    image : PIL.Image.Image
        Image whose pixels are loaded.

    Returns
    -------
    PIL.Image.Image
        The image itself if there is nothing to correct.
    """
    if image.format == "GIF":
        return _clear_uncovered(image)
    if image.format == "BMP" and image.mode == "RGBA":
        has_alpha = image.getchannel("A").getbbox() is not None
        return image if has_alpha else image.convert("RGB")
    return image


def _clear_uncovered(image: Image.Image) -> Image.Image:
    """Make the pixels transparent that the first frame of a GIF does not cover."""
    frame = getattr(image, "dispose_extent", None)  # (left, top, right, bottom)
    if image.tell() > 0 or frame is None or frame == (0, 0, *image.size):
        return image
    covered = Image.new("1", image.size)
    covered.paste(1, frame)
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA"), mask=covered)
    return canvas

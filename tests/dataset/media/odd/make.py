"""Make the odd clips and pictures of this folder, and expected.json with what ffmpeg and ImageMagick read from them.

python tests/dataset/media/odd/make.py needs the programs ffmpeg (5 or newer, with zscale), ImageMagick and heif-enc, and
scikit-image; the tests need only what this wrote. Of every file expected.json has the size, the number of frames, and the mean
colours of a grid of 4 x 3 cells of the first frame.
"""

from __future__ import annotations

import json
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZE = (96, 72)
PROFILES = Path("/usr/share/color/icc")
GRID = (3, 4)  # rows, columns
FFMPEG = ("ffmpeg", "-v", "error", "-y")

X264 = "-c:v libx264 -crf 8"
MATRIX = "scale=out_color_matrix={}:out_range={},format={}"
SQUARE = (
    "scale=round(iw*max(1\\,sar)):round(ih/min(1\\,sar)):in_color_matrix={}:in_range={}:"
    "flags=bicubic+accurate_rnd+full_chroma_int,format=rgb24"
)
MOVING = "scale=112:84,crop=96:72:'mod(n,16)':0,"
ALPHA = "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='X*255/W'"
HDR = (
    "format=gbrp,zscale=min=gbr:tin=iec61966-2-1:pin=bt709:rin=full:t=linear:npl=203:m=gbr:p=bt709:r=full,format=gbrpf32le,"
    "zscale=min=gbr:tin=linear:pin=bt709:rin=full:p=2020:t={}:m=2020_ncl:r=tv:npl=203,format=yuv420p10le"
)
DARK = "lutrgb=r=val*0.78:g=val*0.78:b=val*0.78,"
X265 = "-c:v libx265 -crf 8 -x265-params log-level=error:colorprim=bt2020:transfer={}:colormatrix=bt2020nc"


def square(matrix: str = "bt601", span: str = "tv") -> str:
    return SQUARE.format(matrix, span)


# name: (filter of the source, encoder, filter that ffmpeg reads the file with; or a picture that the clip shows)
CLIPS: dict[str, tuple[str, str, str | Path]] = {
    f"{tag}_{span}.mp4": (
        MATRIX.format(matrix, span, "yuv420p"),
        f"{X264} -colorspace {tag} -color_range {span}",
        square(matrix, span),
    )
    for matrix, tag in (("bt709", "bt709"), ("bt601", "smpte170m"), ("bt601", "bt470bg"), ("bt2020", "bt2020nc"))
    for span in ("tv", "pc")
} | {
    "smpte240m.mp4": (MATRIX.format("smpte240m", "tv", "yuv420p"), f"{X264} -colorspace smpte240m", square("smpte240m")),
    "untagged_hd.mp4": ("scale=1280:720," + MATRIX.format("bt709", "tv", "yuv420p"), "-c:v libx264 -crf 24", square("bt709")),
    "untagged_sd.mp4": (MATRIX.format("bt601", "tv", "yuv420p"), X264, square()),
    "ten_bits.mp4": (MATRIX.format("bt709", "tv", "yuv420p10le"), f"{X264} -colorspace bt709", square("bt709")),
    "prores.mov": (MATRIX.format("bt601", "tv", "yuv422p10le"), "-c:v prores_ks", square()),
    "planar_rgb.mkv": ("format=gbrp", "-c:v libx264rgb -crf 8", "format=rgb24"),
    "grey.mkv": ("format=gray", "-c:v ffv1", "format=rgb24"),
    "grey_10.mkv": ("format=gray10le", "-c:v ffv1", "format=rgb24"),
    "motion_jpeg.avi": ("format=yuvj420p", "-c:v mjpeg -q:v 3", square("bt601", "pc")),
    "theora.ogv": ("format=yuv420p", "-c:v libtheora -q:v 8", square()),
    "mpeg4.3gp": ("format=yuv420p", "-c:v mpeg4 -q:v 3", square()),
    "wmv2.wmv": ("format=yuv420p", "-c:v wmv2 -q:v 3", square()),
    "sorenson.flv": ("format=yuv420p", "-c:v flv -q:v 3", square()),
    "av1.mkv": ("format=yuv420p", "-c:v libaom-av1 -crf 20 -cpu-used 8", square()),
    "aspect_64_45.mkv": ("format=yuv420p,setsar=64/45", X264, square()),
    "aspect_8_9.mp4": ("format=yuv420p,setsar=8/9", X264, square()),
    "turned_90.mp4": ("format=yuv420p,setsar=4/3", f"{X264} -metadata:s:v rotate=90", square()),
    "turned_180.mp4": ("format=yuv420p,setsar=4/3", f"{X264} -metadata:s:v rotate=180", square()),
    "turned_270_jpeg.mov": ("format=yuvj420p", "-c:v mjpeg -q:v 3 -metadata:s:v rotate=270", square("bt601", "pc")),
    "odd_size.mkv": ("scale=51:39,format=yuv420p", "-c:v ffv1", square()),
    "tiny.mkv": ("scale=18:34,format=yuv444p", "-c:v ffv1", square()),
    "interlaced.mp4": (
        MOVING + "format=yuv420p,tinterlace=interleave_top,setfield=tff",
        f"{X264} -flags +ildct+ilme -x264opts tff=1",
        "bwdif=mode=send_frame:deint=interlaced," + square(),
    ),
    "interlaced_dvd.mpg": (
        MOVING + "format=yuv420p,tinterlace=interleave_top,setfield=tff,setsar=64/45",
        "-c:v mpeg2video -flags +ildct+ilme -q:v 3 -r 25",
        "bwdif=mode=send_frame:deint=interlaced," + square(),
    ),
    "uneven.mp4": (MOVING + "select='not(mod(n,2))+eq(n,3)',format=yuv420p", f"{X264} -vsync vfr", square()),
    "alpha_qtrle.mov": (ALPHA, "-frames:v 2 -c:v qtrle", HERE / "over_white.png"),
    "alpha_png.mov": (ALPHA, "-frames:v 1 -c:v png", HERE / "over_white.png"),
    "alpha_prores.mov": (ALPHA, "-frames:v 1 -c:v prores_ks -pix_fmt yuva444p10le", HERE / "over_white.png"),
    "alpha_vp9.webm": (ALPHA, "-c:v libvpx-vp9 -pix_fmt yuva420p -crf 15 -b:v 0", HERE / "over_white.png"),
    "alpha_vp8.webm": (ALPHA, "-c:v libvpx -auto-alt-ref 0 -pix_fmt yuva420p -crf 10 -b:v 1M", HERE / "over_white.png"),
    "moving.gif": ("format=rgb24", "-c:v gif", "format=rgb24"),
    "moving.webp": (MOVING + "format=rgb24", "-c:v libwebp_anim -lossless 1", HERE / "first.png"),
    "hlg.mp4": (DARK + HDR.format("arib-std-b67"), X265.format("arib-std-b67"), HERE / "dark.png"),
    "pq.mp4": (DARK + HDR.format("smpte2084"), X265.format("smpte2084"), HERE / "dark.png"),
    "sdr_2020.mp4": (HDR.format("iec61966-2-1"), X265.format("bt2020-10"), HERE / "source.png"),
}  # fmt: skip


def run(*command: object) -> bytes:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True).stdout


def grid(pixels: np.ndarray) -> list:
    """(H, W, 3) -> the mean colour of each cell."""
    rows = np.array_split(pixels, GRID[0])
    return [[cell.mean(axis=(0, 1)).round(1).tolist() for cell in np.array_split(row, GRID[1], 1)] for row in rows]


def make_clips(expected: dict) -> None:
    for name, (source, encoder, reader) in CLIPS.items():
        path, still = HERE / name, ("-loop", 1, "-framerate", 24, "-t", 0.25)
        run(*FFMPEG, *still, "-i", HERE / "source.png", "-vf", source, *encoder.split(), path)
        if "rotate=" in encoder:  # is written where streams are copied
            (before := HERE / f"before_{name}").write_bytes(path.read_bytes())
            run(*FFMPEG, "-i", before, "-c", "copy", "-metadata:s:v", encoder[encoder.index("rotate=") :], path)
            before.unlink()
        if isinstance(reader, Path):
            pixels = np.asarray(Image.open(reader).convert("RGB"))
            counted = ("-count_frames", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0")
            frames = 6 if name.endswith("webp") else int(run("ffprobe", "-v", "error", *counted, path).split()[0])
        else:
            run(*FFMPEG, "-i", path, "-vf", reader, "-frames:v", 1, HERE / "shape.png")
            pixels = np.asarray(Image.open(HERE / "shape.png").convert("RGB"))
            decoded = run(*FFMPEG, "-i", path, "-vf", reader, "-vsync", 0, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
            frames = len(decoded) // pixels.size
        expected[name] = {"size": pixels.shape[1::-1], "frames": frames, "grid": grid(pixels)}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_pictures(expected: dict, source: Image.Image) -> None:
    profile = {path.stem: path.read_bytes() for path in PROFILES.rglob("*.icc")}
    adobe, cmyk = profile["compatibleWithAdobeRGB1998"], profile["default_cmyk"]
    transparent = source.copy()
    transparent.putalpha(Image.fromarray(np.tile((np.arange(SIZE[0]) * 255 // SIZE[0]).astype(np.uint8), (SIZE[1], 1))))
    transparent_grey = source.convert("L")
    transparent_grey.putalpha(transparent.getchannel("A"))
    sixteen_bits = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    jpeg = {"quality": 95, "format": "JPEG"}
    for name, image, options in (
        ("adobe.png", source, {"icc_profile": adobe}),
        ("adobe.jpg", source, jpeg | {"icc_profile": adobe}),
        ("adobe.webp", source, {"icc_profile": adobe, "lossless": True}),
        ("adobe.tif", source, {"icc_profile": adobe}),
        ("prophoto.png", source, {"icc_profile": profile["ProPhotoRGB"]}),
        ("srgb.png", source, {"icc_profile": profile["sRGB"]}),
        ("swapped.png", source, {"icc_profile": profile["SwappedRedAndGreen"]}),
        ("eci.jpg", source, jpeg | {"icc_profile": profile["ECI-RGBv2"]}),
        ("grey_profile.png", source.convert("L"), {"icc_profile": profile["Gray"]}),
        ("palette_adobe.png", source.convert("P"), {"icc_profile": adobe}),
        ("cmyk.jpg", source.convert("CMYK"), jpeg | {"icc_profile": cmyk}),
        ("transparent.png", transparent, {}),
        ("transparent_adobe.png", transparent, {"icc_profile": adobe}),
        ("transparent_grey.png", transparent_grey, {}),
        ("one_bit.png", source.convert("1"), {}),
        ("sixteen_bits.png", sixteen_bits, {}),
        ("plain.jpe", source, jpeg),
        ("plain.jfif", source, jpeg),
        ("plain.gif", source.convert("P"), {}),
    ):
        image.save(HERE / name, **options)
        read_picture(expected, name)
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        source.save(
            HERE / f"orientation_{orientation}.jpg", exif=exif, icc_profile=adobe if orientation in (3, 6) else None, **options
        )
        read_picture(expected, f"orientation_{orientation}.jpg")
    run("heif-enc", "-q", 95, HERE / "source.png", "-o", HERE / "phone.heic")
    expected["phone.heic"] = {"size": SIZE, "grid": grid(np.asarray(source))}
    dark = np.asarray(Image.open(HERE / "dark.png"))
    for name, transfer in (("pq.avif", "smpte2084"), ("hlg.avif", "arib-std-b67")):
        light = DARK + HDR.format(transfer).replace("r=tv", "r=full").replace("yuv420p10le", "yuv444p10le")
        tags = f"-color_primaries bt2020 -color_trc {transfer} -colorspace bt2020nc -color_range pc".split()
        run(
            *FFMPEG,
            "-i",
            HERE / "source.png",
            "-vf",
            light,
            "-c:v",
            "libaom-av1",
            "-crf",
            8,
            "-still-picture",
            1,
            *tags,
            HERE / name,
        )
        expected[name] = {"size": SIZE, "grid": grid(dark)}
    plain = (HERE / "source.png").read_bytes()
    place = plain.index(b"IDAT") - 4
    (HERE / "gamma_1.png").write_bytes(plain[:place] + chunk(b"gAMA", struct.pack(">I", 100_000)) + plain[place:])
    read_picture(expected, "gamma_1.png")


def read_picture(expected: dict, name: str) -> None:
    upright = ("-auto-orient", "+repage", "-background", "white", "-flatten")
    converted = ("-intent", "relative", "-black-point-compensation", "-profile", PROFILES / "sRGB.icc", "-strip", "-depth", 8)
    run("convert", HERE / f"{name}[0]", *upright, *converted, HERE / "read.ppm")
    pixels = np.asarray(Image.open(HERE / "read.ppm").convert("RGB"))
    expected[name] = {"size": pixels.shape[1::-1], "grid": grid(pixels)}


def main() -> None:
    import skimage

    photograph = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB").crop((0, 0, 512, 384))
    source = Image.fromarray(np.asarray(photograph.resize(SIZE)))  # without its profile
    source.save(HERE / "source.png")
    pixels, alpha = np.asarray(source, float), (np.arange(SIZE[0]) * 255 // SIZE[0])[None, :, None] / 255
    helpers = {"over_white": pixels * alpha + 255 * (1 - alpha), "dark": pixels * 0.78}
    for name, values in helpers.items():
        Image.fromarray(np.rint(values).astype(np.uint8)).save(HERE / f"{name}.png")
    run(*FFMPEG, "-i", HERE / "source.png", "-vf", MOVING + "format=rgb24", HERE / "first.png")
    expected: dict = {}
    make_clips(expected)
    make_pictures(expected, source)
    for name in ("over_white.png", "dark.png", "first.png", "shape.png", "read.ppm", "source.png"):
        (HERE / name).unlink()
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Damaged files of every kind that is read, made from whole ones: ``python tests/fuzzing.py SEED COUNT FOLDER [KIND]``, with the
project's folder in PYTHONPATH.

Each ends in what the file means or in one sentence, in time, in bounded memory. Whatever else happens ends this process, which
is the test's; its last line says which file it was.
"""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from gguf_writing import write_gguf
from PIL import Image, ImageCms
from safetensors.torch import save_file

from dataset import load_dataset_config
from dataset.cache.files import (
    read_latent_header,
    read_latents,
    read_text,
    read_text_header,
    read_text_length,
    save_latents,
    save_text,
)
from dataset.config import DatasetConfig
from dataset.items import list_items
from dataset.media.decoding import frames_at_rate, iterate_frames, probe_video, read_clip_windows
from dataset.media.pictures import probe_image, read_image
from hunyuan_model import check_text_encoder_files, check_transformer_file, check_vae_file
from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.sampling.prompts import read_prompts
from hunyuan_model.text import clip, llm
from hunyuan_model.text.tokenizers import fingerprint_tokenizer, load_tokenizer, token_ids
from networks.formats.reading import check_lora_file, read_lora
from networks.training.arguments import build_training_parser
from utils.cli.config_files import parse_with_config
from utils.errors import UserError
from utils.media.metadata import read_media_metadata
from utils.media.writing import save_picture, save_video

TESTS = Path(__file__).resolve().parent
SECONDS = 20  # for one file
MEGABYTES = 2000  # above what the process has when it begins, for all files
GOLDENS, TOY, MEDIA = TESTS / "goldens", TESTS.parent / "examples" / "toy", TESTS / "dataset" / "media"
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
VALUES = (
    None,
    True,
    0,
    -1,
    1,
    7,
    1 << 31,
    1 << 40,
    1 << 64,
    10**400,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
)
LARGEST_SLICE = 1 << 12
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """A file that is read: its content, what reads it in a folder of its own, and whether it is JSON."""

    name: str
    whole: bytes
    read: Read
    beside: Path | None = None  # a folder whose other files stand beside it
    is_json: bool = False
    header: int = 0  # bytes at the start in which most of the damage is


def mutated(content: bytes, chance: random.Random, header: int) -> bytes:
    """A few changes of bytes."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        end = min(len(changed), header) if header and chance.random() < 0.8 else len(changed)
        at, size = chance.randrange(end + 1), chance.choice((1, 1, 2, 4, 8))
        match chance.randrange(9):
            case 0 | 1:
                changed[at : at + 1] = bytes([(changed[at] if at < len(changed) else 0) ^ (1 << chance.randrange(8))])
            case 2:
                changed[at : at + size] = chance.choice(NUMBERS).to_bytes(8, "little")[:size]
            case 3:
                changed[at : at + size] = chance.choice(NUMBERS).to_bytes(8, "big")[-size:]
            case 4:
                del changed[at : at + chance.randrange(1, LARGEST_SLICE)]
            case 5:
                del changed[at:]
            case 6:
                changed[at:at] = chance.randbytes(chance.randrange(64))
            case 7:
                begin = chance.randrange(end + 1)
                changed[at:at] = changed[begin : begin + chance.randrange(LARGEST_SLICE)]
            case _:
                changed[at : at + size] = bytes(size)
    return bytes(changed)


def mutated_json(content: bytes, chance: random.Random) -> bytes:
    """A few values that are of another kind, gone, doubled or under another name."""
    document = json.loads(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(document))
        where, key = chance.choice(places) if places else (None, None)
        match chance.randrange(6) if places else 9:
            case 0 | 1 | 2:
                where[key] = chance.choice((*VALUES, [], {}, [[]], {"": None}, where[chance.choice(_keys(where))]))
            case 3:
                del where[key]
            case 4 if isinstance(where, dict):
                where[chance.choice(("", "type", "Regex", "content", "x", "__metadata__"))] = where[key]
            case 4:
                where.insert(0, where[key])
            case 5:
                where[key] = _nested(where[key], chance.choice((2, 50, 2000)))
            case _:
                document = chance.choice(VALUES)
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * 100_000


def _nested(value: object, depth: int) -> object:
    for _ in range(depth):
        value = [value]
    return value


def _keys(where: dict | list) -> list:
    return list(where) if isinstance(where, dict) else list(range(len(where)))


def _places(document: object) -> Iterator[tuple[dict | list, object]]:
    """Each place of a document in which a value stands; of long lists and objects a few."""
    todo = [document]
    while todo:
        where = todo.pop()
        if isinstance(where, dict | list):
            for key in _keys(where)[:40]:
                yield where, key
                todo.append(where[key])


def text_of_tokenizer(place: object) -> Read:
    def read(path: Path) -> None:
        checkpoint = type("Checkpoint", (), {"path": path.parent, "dtypes": {}})()
        tokenizer = load_tokenizer(path.parent, checkpoint, place)
        token_ids(tokenizer, ["", "A photo of a cat, 猫.\nDon't 12345!", "a" * 3000, " " * 3000, "aA1 !" * 600])
        fingerprint_tokenizer(tokenizer)

    return read


def read_checkpoint(path: Path) -> None:
    checkpoint = open_checkpoint(path, "model")
    for name in islice(checkpoint.shapes, 20):
        checkpoint.get(name)


def read_picture(path: Path) -> None:
    _all_of(lambda: probe_image(path), lambda: read_image(path, (64, 64)))


def read_video(path: Path) -> None:
    info = probe_video(path)
    count, resampling, _ = frames_at_rate(path, info.fps, 24.0, 5)
    _all_of(
        lambda: list(read_clip_windows(path, [(0, min(5, count))], (32, 32), resampling and resampling.indices)),
        lambda: list(islice(iterate_frames(path), 30)),
    )


def _all_of(*reads: Callable[[], object]) -> None:
    """All of them, whatever one ends with."""
    refused = None
    for read in reads:
        try:
            read()
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def read_dataset_of(name: str) -> Read:
    def read(path: Path) -> None:
        jsonl = path if name == "jsonl" else None
        folder = None if jsonl else path.parent
        list_items(DatasetConfig(0, "image", folder, jsonl, path.parent / "cache", caption_extension=".txt"))

    return read


def metadata_of(path: Path) -> None:
    read_media_metadata(path, "--from_file")


def kinds(folder: Path) -> Iterator[Kind]:
    """Every kind of file, with its whole files made in ``folder``."""
    torch.manual_seed(0)

    def of(name: str, path: Path, read: Read, **more: object) -> Kind:
        return Kind(f"{name}{path.suffix}" if "." not in name else name, path.read_bytes(), read, **more)

    # Weights. Their headers are JSON behind eight bytes.
    encoders = {"llm": lambda path: check_text_encoder_files(path, GOLDENS / "text_clip")}
    encoders["clip"] = lambda path: check_text_encoder_files(GOLDENS / "text_llm", path)
    yield of(
        "transformer", GOLDENS / "dit.safetensors", lambda path: (check_transformer_file(path), read_checkpoint(path)), header=8000
    )
    yield of("vae", GOLDENS / "vae.safetensors", check_vae_file, header=12000)
    yield of("llm", GOLDENS / "text_llm/model.safetensors", encoders["llm"], beside=GOLDENS / "text_llm", header=3000)
    yield of("clip", GOLDENS / "text_clip/model.safetensors", encoders["clip"], beside=GOLDENS / "text_clip", header=3000)
    save_file({f"layers.{index}.weight": torch.ones(3, 4) for index in range(6)}, folder / "m.safetensors", {"a": "b"})
    yield of("small", folder / "m.safetensors", read_checkpoint, header=700)
    for old in (False, True):
        wrapped = {"module": {f"layers.{index}.weight": torch.ones(3, 4) for index in range(6)}, "step": 3}
        torch.save(wrapped, folder / "m.pt", _use_new_zipfile_serialization=not old)
        yield of("old torch.pt" if old else "torch.pt", folder / "m.pt", read_checkpoint, header=1000)
    torch.save(wrapped, folder / "m.pt")
    with zipfile.ZipFile(folder / "m.pt") as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    yield Kind("pickle.pt", pickled, lambda path: _in_a_zip(path, folder / "m.pt"))
    tensors = {"token_embd.weight": torch.ones(4, 32), "blk.0.attn_q.weight": torch.ones(32, 32)}
    write_gguf(folder / "m.gguf", "llama", tensors, ["blk.0.attn_q.weight"], "Q8_0", embedding_length=32, rope__freq_base=1.0)
    yield of("gguf", folder / "m.gguf", read_checkpoint, header=400)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}).encode()
    sharded = folder / "sharded"
    sharded.mkdir()
    shutil.copy(folder / "m.safetensors", sharded)
    yield Kind("model.safetensors.index.json", index, lambda path: read_checkpoint(path.parent), sharded, is_json=True)

    # What stands beside them.
    for name, read in encoders.items():
        golden = GOLDENS / f"text_{name}"
        yield of("config.json", golden / "config.json", lambda path, read=read: read(path.parent), beside=golden, is_json=True)
    yield of("config.json", TOY / "vae/config.json", lambda path: check_vae_file(path.parent), beside=_vae(folder), is_json=True)
    for toy, part in (("text_encoder", llm), ("text_encoder_2", clip)):
        for path in sorted(
            path for path in (TOY / toy).iterdir() if path.suffix in (".json", ".txt") and path.name != "config.json"
        ):
            beside = folder / f"{toy}_{path.stem}"
            beside.mkdir()
            for other in (other for other in (TOY / toy).iterdir() if other.suffix in (".json", ".txt") and other != path):
                shutil.copy(other, beside)
            yield of(path.name, path, text_of_tokenizer(part.TOKENIZER), beside=beside, is_json=path.suffix == ".json")

    # LoRA.
    for name in ("lora", "lora_other"):
        yield of(
            name,
            GOLDENS / f"{name}.safetensors",
            lambda path: _all_of(lambda: read_lora(path), lambda: check_lora_file(path)),
            header=9000,
        )
    peft = folder / "peft"
    peft.mkdir()
    weights = {f"base_model.model.single_blocks.0.linear1.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    save_file(weights, peft / "adapter_model.safetensors")
    adapter = {"r": 4, "lora_alpha": 4, "rank_pattern": {"linear1": 4}, "alpha_pattern": {r".*\.linear1": 2}, "use_rslora": False}
    yield Kind("adapter_config.json", json.dumps(adapter).encode(), lambda path: read_lora(path.parent), peft, is_json=True)

    # Caches.
    save_latents(folder / "l.safetensors", torch.zeros(16, 1, 4, 4), (32, 32), None, {"a": "b"})
    yield of(
        "latents", folder / "l.safetensors", lambda path: _all_of(lambda: read_latent_header(path), lambda: read_latents(path))
    )
    save_text(folder / "t.safetensors", torch.zeros(4, 8), torch.ones(4), torch.zeros(6), "a caption", {"a": "b"})
    texts = (read_text_header, read_text, read_text_length)
    yield of("text", folder / "t.safetensors", lambda path: _all_of(*(lambda read=read: read(path) for read in texts)))

    # What people write.
    toml = b'[general]\nresolution = [64, 32]\nbatch_size = 2\n[[datasets]]\nimage_directory = "."\ncache_directory = "c"\n'
    yield Kind("dataset.toml", toml, load_dataset_config)
    settings = b'learning_rate = 1e-4\nnetwork_args = ["a=b"]\nsdpa = true\nmax_train_epochs = 2\n'
    yield Kind("config.toml", settings, lambda path: parse_with_config(build_training_parser(), ["--config_file", str(path)]))
    yield Kind(
        "prompts.txt", b"a cat --w 64 --h 32 --n bad, dark\n# no\na dog --d 7 --am 0.5,1\n", lambda path: read_prompts(path, "--f")
    )
    yield Kind(
        "prompts.toml", b'[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a cat"\n', lambda path: read_prompts(path, "--f")
    )
    listed = json.dumps([{"prompt": "a cat", "width": 64, "seed": 3}, "a dog --d 7"]).encode()
    yield Kind("prompts.json", listed, lambda path: read_prompts(path, "--f"), is_json=True)
    yield Kind("items.jsonl", b'{"image_path": "a.png", "caption": "x"}\n{"image_path": "b.png"}\n', read_dataset_of("jsonl"))
    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / "a.png").touch()
    yield Kind("a.txt", "a caption of a café\n".encode(), read_dataset_of("caption"), pictures)

    # Media, in every container.
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    formats = {
        "png": {"icc_profile": profile},
        "jpg": {"progressive": True},
        "webp": {},
        "gif": {},
        "bmp": {},
        "tif": {"compression": "tiff_lzw"},
    }
    for ending in (*formats, "avif", "heic"):
        path = folder / f"a.{ending}"
        try:
            Image.fromarray(noise).save(path, **formats.get(ending, {}))
        except (KeyError, ValueError, OSError):  # an optional package
            continue
        yield of("picture", path, read_picture, header=400)
    for path in sorted((*(MEDIA / "odd").iterdir(), *(MEDIA / "cases").iterdir())):
        if path.is_file() and path.stat().st_size < 1 << 17 and path.suffix not in (".txt", ".md", ".py", ".toml", ".json"):
            still = path.suffix in (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".avif", ".heic", ".bmp")
            yield of(path.name, path, read_picture if still else read_video, header=2000)
    for codec, ending in (
        ("libx264", "mp4"),
        ("libx264", "mkv"),
        ("libvpx-vp9", "webm"),
        ("mpeg4", "avi"),
        ("mpeg2video", "ts"),
        ("gif", "gif"),
    ):
        path = folder / f"clip.{ending}"
        if _write_clip(path, codec, noise):
            yield of("clip", path, read_video, header=1000)
    frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    yield of("animated", folder / "animated.webp", read_video, header=200)
    said = {"prompt": "a cat", "seed": "3", "infer_steps": "2", "settings": json.dumps({"prompt": "a cat"})}
    save_video(folder / "made.mp4", np.stack([noise[:, :32], noise[:, :32]]), fps=24, metadata=said)
    save_picture(folder / "made.png", noise, metadata=said)
    for ending in ("mp4", "png"):
        yield of("made", folder / f"made.{ending}", metadata_of, header=600)


def _vae(folder: Path) -> Path:
    beside = folder / "vae"
    beside.mkdir()
    shutil.copy(GOLDENS / "vae.safetensors", beside / "diffusion_pytorch_model.safetensors")
    return beside


def _in_a_zip(path: Path, whole: Path) -> None:
    """Put a damaged pickle into a file of torch, and read that."""
    content = path.read_bytes()
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, content if name.endswith("data.pkl") else archive.read(name))
    read_checkpoint(path)


def _write_clip(path: Path, codec: str, pixels: np.ndarray) -> bool:
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=24)
            stream.width, stream.height = pixels.shape[1::-1]
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for shift in range(6):
                frame = av.VideoFrame.from_ndarray(np.roll(pixels, shift, 1), "rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode(None))
    except (av.FFmpegError, ValueError):  # a build without that encoder
        return False
    return True


def peak_megabytes() -> float:
    """The most memory that the process has had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def fuzz(seed: int, count: int, folder: Path, only: str = "") -> int:
    """Read ``count`` damaged files; returns how many ended in anything but a UserError of one line."""
    warnings.simplefilter("ignore")
    whole, at_work = folder / "whole", folder / "at_work"
    whole.mkdir(parents=True)
    everything = [kind for kind in kinds(whole) if only in kind.name]
    for kind in everything:  # imports, and what the mutations are made from is read
        try:
            _read(kind, kind.whole, at_work)
        except UserError as error:
            print(f"FAULT {kind.name} is not whole: {error}")
    before, faults, refused, slowest = peak_megabytes(), 0, 0, (0.0, "")
    for number in range(count):
        kind = everything[number % len(everything)]
        chance = random.Random(f"{seed} {number} {kind.name}")
        content = (
            mutated_json(kind.whole, chance) if kind.is_json and chance.random() < 0.7 else mutated(kind.whole, chance, kind.header)
        )
        what, start = f"{kind.name} seed {seed} number {number}", time.monotonic()
        print(what, end="\r", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            _read(kind, content, at_work)
        except UserError as error:
            refused += 1
            if len(str(error).splitlines()) != 1 or len(str(error)) > 4000:
                faults += 1
                print(f"FAULT {what}: {error}")
        except BaseException:
            faults += 1
            print(f"FAULT {what}\n{traceback.format_exc()}")
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, (time.monotonic() - start, what))
    grown = peak_megabytes() - before
    print(f"{count} files of {len(everything)} kinds: {refused} refused, {faults} faults, {grown:.0f} MB, slowest {slowest}")
    return faults + (grown > MEGABYTES)


def _read(kind: Kind, content: bytes, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in kind.beside.iterdir() if kind.beside else ():
        (folder / path.name).symlink_to(path)
    path = folder / kind.name.replace(" ", "_")
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    kind.read(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(1, fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])))

"""Trainings that never were, for tests of their report."""

from __future__ import annotations

import base64
import math

import numpy as np

from networks.training.report.record import Curve, RunRecord, SampleRecord, Status, WrittenFile
from utils.pages.media import clip_uri, data_uri, picture_uri

EVIL = """</script><script>document.title = "run"</script><img src=x onerror="document.title='run'">&amp; <b>"q"</b> 'q' שלום 🦊"""
PROMPTS = (
    EVIL,
    "a fox that runs over a field",
    "a lighthouse in a storm, waves, wide shot, overcast",
    "a cup of tea",
    "a paper boat",
)


def frames(seed: int, count: int = 17, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """A disc that moves over a ground of soft colours: (count, H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / size[0]
    ground, ink = random.uniform(40, 215, (2, 3))
    made = []
    for index in range(count):
        angle = index / count * 2 * math.pi + seed
        mask = ((x - 0.75 - 0.4 * math.cos(angle)) ** 2 + (y - 0.5 - 0.25 * math.sin(angle)) ** 2 < 0.04)[..., None]
        made.append(np.where(mask, ink, ground * (0.6 + 0.4 * y[..., None])))
    return np.asarray(made, np.uint8)


def padded(clip: str, count: int) -> str:
    """A clip with ``count`` bytes more, in a box that players skip."""
    content = base64.b64decode(clip.partition(",")[2])
    return data_uri("video/mp4", content + (8 + count).to_bytes(4, "big") + b"free" + bytes(count))


def synthetic_run(
    name: str = "fox",
    steps: int = 400,
    prompts: int = 2,
    samples_each: int = 4,
    seed: int = 0,
    padding: int = 0,
    **changed: object,
) -> RunRecord:
    """A training with clips for its samples, the last prompt with pictures; ``padding`` makes each clip as many bytes larger."""
    random = np.random.default_rng(seed)
    numbers = np.arange(1, steps + 1)
    loss = 0.08 + 0.25 * np.exp(-numbers / steps * 5) + random.gamma(2, 0.03, steps)
    loss[steps // 2] = math.nan
    seconds = random.normal(1.6, 0.05, steps)
    seconds[0] = 45
    every = np.unique(np.linspace(1, steps, min(steps, 50)).astype(int))
    curves = {
        "loss/current": Curve(numbers.tolist(), loss.tolist()),
        "loss/average": Curve(numbers.tolist(), loss.tolist()),
        "loss/validation": Curve(every.tolist(), (0.12 + 0.2 * np.exp(-every / steps * 4)).tolist()),
        "lr/unet": Curve(numbers.tolist(), (1e-4 * (1 + np.cos(numbers / steps * math.pi)) / 2).tolist()),
        "lr/plus": Curve(numbers.tolist(), (4e-4 * (1 + np.cos(numbers / steps * math.pi)) / 2).tolist()),
        "grad_norm": Curve(numbers.tolist(), random.gamma(3, 0.05, steps).tolist()),
        "update/relative_norm": Curve(every.tolist(), (0.02 * np.sqrt(every / steps)).tolist()),
        "seconds_per_step": Curve(numbers.tolist(), seconds.tolist()),
        "memory/peak_gib": Curve(numbers.tolist(), (18 + np.minimum(numbers / 50, 3)).tolist()),
    }
    clips = [frames(seed + index) for index in range(8)]
    media = [(picture_uri(clip[0], 96), padded(clip_uri(clip, 24, 96), padding)) for clip in clips]
    samples = []
    for number, step in enumerate(np.linspace(steps / samples_each, steps, samples_each).astype(int).tolist()):
        for index in range(prompts):
            uri, clip = media[(number + index) % 8]
            is_picture = index == prompts - 1 and prompts > 2
            file = f"sample/{name}_{step:06d}_{index:02d}_20260101_{seed + index}.{'png' if is_picture else 'mp4'}"
            settings = {"size": "96x64", "frames": "1" if is_picture else "17", "steps": "20"}
            prompt = f"{PROMPTS[index % len(PROMPTS)]}{' again' * (index // len(PROMPTS))}"
            samples.append(SampleRecord(step, index, prompt, seed + index, file, uri, "" if is_picture else clip, settings))
    file, keys = f"{name}.safetensors", "240 of 240 keys"
    values = {
        "status": Status.FINISHED,
        "steps": steps,
        "planned_steps": steps,
        "started_at": 1.78e9,
        "written_at": 1.78e9 + 1.62 * steps,
        "curves": curves,
        "samples": samples,
        "written": [
            WrittenFile(file, "this project", f"python hv_generate_video.py --lora_weight {file}", keys),
            WrittenFile(f"comfyui_{file}", "ComfyUI", "Put it into models/loras and load it with LoraLoaderModelOnly.", keys),
            WrittenFile(f"diffusers_{file}", "diffusers", f'pipe.load_lora_weights("diffusers_{file}")', keys),
        ],
        "flags": {f"flag_{index}": index for index in range(40)} | {"seed": seed, "note": EVIL, "none": None},
        "data": [{"kind": "video", "items": 12, "resolution": [96, 64]}],
        "table": "data set   items  used  left out\nclips         12    12         0",
        "hardware": {"GPU": "NVIDIA GeForce RTX 4090", "memory": "24 GiB"},
        "versions": {"torch": "2.13.0", "python": "3.11"},
        "command": f"accelerate launch hv_train_network.py --output_name {name} --seed {seed}",
    }
    return RunRecord(**{"name": name, "session_id": str(seed), **values, **changed})

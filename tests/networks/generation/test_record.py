"""networks.generation.record: what made a result stands in its metadata, for exactly that one."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan_model.sampling.generation import SamplingSettings
from networks.generation.record import (
    Recorder,
    described,
    identity,
    recorded_flags,
    settings_of,
    versions_of,
    warn_of_changes,
    with_flags,
)
from networks.generation.requests import Request
from utils.checksums import file_sha256
from utils.errors import UserError
from utils.media.writing import save_picture

RUN = {"dit": "dit.safetensors", "prompt": "of the run", "lora_multiplier": [1.0], "fp8": True, "output_type": "gif"}


def recorder(folder: Path, mode: str = "merge", flags=RUN) -> Recorder:
    paths = []
    for name in ("a", "b"):
        paths.append(str(folder / f"{name}.safetensors"))
        Path(paths[-1]).write_bytes(name.encode() * 9)
    return Recorder(flags, tuple(paths), mode, {"torch": "9.9"})


def request(**values) -> Request:
    start = Request("a ball", SamplingSettings(seed=7), lora_multiplier=(0.5, 1.0))
    return start.changed(values)


def test_the_flags_are_those_of_the_one_result(tmp_path):
    written = recorder(tmp_path).metadata(request(infer_steps=3, height=32, lora_multiplier=(0.25, 2.0)))
    settings = settings_of(written)
    flags, names = settings["flags"], [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert (flags["prompt"], flags["infer_steps"], flags["video_size"]) == ("a ball", 3, [32, 256])
    assert (flags["lora_weight"], flags["lora_multiplier"], flags["lora_mode"]) == (names, [0.25, 2.0], "merge")
    assert flags["dit"] == "dit.safetensors" and flags["fp8"] is True
    assert not {"negative_prompt", "image_path", "name", "where", "seed_given", "sampling"} & flags.keys()
    digests = [hashlib.sha256(name * 9).hexdigest() for name in (b"a", b"b")]
    assert [(entry["sha256"], entry["multiplier"]) for entry in settings["lora"]] == list(zip(digests, (0.25, 2.0)))
    assert written["lora"] == "a.safetensors (0.25), b.safetensors (2)"
    assert settings["versions"] == {"torch": "9.9"} and "random" not in settings


def test_an_injected_lora_with_multiplier_0_is_not_part_of_a_result(tmp_path):
    nothing = recorder(tmp_path, "inject").metadata(request(lora_multiplier=(0.0, 0.0)))
    assert settings_of(nothing)["lora"] == [] and nothing["lora"] == ""
    assert not {"lora_weight", "lora_multiplier", "lora_mode"} & settings_of(nothing)["flags"].keys()
    one = settings_of(recorder(tmp_path, "inject").metadata(request(lora_multiplier=(0.0, 0.5))))["flags"]
    assert (one["lora_weight"], one["lora_multiplier"]) == ([str(tmp_path / "b.safetensors")], [0.5])
    assert len(settings_of(recorder(tmp_path).metadata(request(lora_multiplier=(0.0, 0.5))))["lora"]) == 2


def test_start_media_have_their_hash(tmp_path):
    (tmp_path / "start.png").write_bytes(b"pixels")
    settings = settings_of(recorder(tmp_path).metadata(request(image_path=str(tmp_path / "start.png"))))
    assert settings["start"] == {"file": str(tmp_path / "start.png"), "sha256": hashlib.sha256(b"pixels").hexdigest()}
    (tmp_path / "frames").mkdir()
    for name in ("1.png", "0.png"):
        (tmp_path / "frames" / name).write_bytes(name.encode())
    assert file_sha256(tmp_path / "frames") == hashlib.sha256(b"0.png1.png").hexdigest()


@pytest.mark.parametrize(
    ("same", "changes"),
    [
        (False, {"prompt": "another"}),
        (False, {"lora_multiplier": (0.5, 0.9)}),
        (False, {"seed": 8}),
        (True, {"split_uncond": True}),
    ],
)
def test_two_results_are_the_same_if_made_alike(tmp_path, same, changes):
    first = identity(recorder(tmp_path).metadata(request()))
    assert first is not None
    assert (identity(recorder(tmp_path).metadata(request(**changes))) == first) is same


def test_random_seeds_and_files_of_a_name_do_not_tell_results_apart_or_together(tmp_path):
    draws = [Request("a", SamplingSettings(seed=seed), lora_multiplier=(1.0, 1.0), seed_given=False) for seed in (1, 2)]
    first, second = (identity(recorder(tmp_path).metadata(draw)) for draw in draws)
    chosen = identity(recorder(tmp_path).metadata(draws[0].changed({"seed": 1})))
    assert first == second != chosen
    other = recorder(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"trained on")
    assert identity(other.metadata(draws[0])) != first
    assert identity(recorder(tmp_path, flags={**RUN, "blocks_to_swap": 9, "output_type": "video"}).metadata(draws[0])) == first


def test_a_lora_is_the_same_merged_and_beside_the_weights_and_none_with_multiplier_0(tmp_path):
    half, alone = request(lora_multiplier=(0.5, 0.0)), Recorder(RUN, (str(tmp_path / "a.safetensors"),), "merge", {})
    merged = identity(recorder(tmp_path).metadata(half))
    assert identity(recorder(tmp_path, "inject").metadata(half)) == merged
    assert identity(alone.metadata(request(lora_multiplier=(0.5,)))) == merged
    assert identity(recorder(tmp_path, "inject").metadata(request(lora_multiplier=(0.6, 0.0)))) != merged


def test_latents_that_are_decoded_later_say_so(tmp_path):
    of_latents = recorder(tmp_path, flags={**RUN, "output_type": "latent"}).metadata(request())
    decoded = with_flags(of_latents, {"output_type": "images", "vae": "vae"})
    assert settings_of(decoded)["flags"] == {**settings_of(of_latents)["flags"], "output_type": "images", "vae": "vae"}
    assert with_flags({"prompt": "a"}, {"vae": "vae"}) == {"prompt": "a"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"flags": []}', "[" * 100_000, json.dumps({"flags": {}, "lora": [1]})])
def test_damaged_settings_are_none(text):
    assert settings_of({"settings": text}) is None and identity({"settings": text}) is None


def test_a_file_does_not_decide_what_is_downloaded(tmp_path):
    written = recorder(tmp_path, flags={**RUN, "tokenizer1": "somebody/tokenizer"}).metadata(request())
    save_picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), written)
    with pytest.raises(UserError, match="--tokenizer1 somebody/tokenizer, which is not here"):
        recorded_flags(str(tmp_path / "a.png"), ())
    assert recorded_flags(str(tmp_path / "a.png"), ("tokenizer1",))["prompt"] == "a ball"


def test_versions_name_what_computes():
    versions = versions_of("torch", torch.device("cpu"))
    assert versions["torch"] == torch.__version__ and versions["attention"] == "torch" and versions["device"].startswith("CPU")
    assert versions["musubi-tuner"][0].isdigit()
    assert versions_of("xformers", torch.device("cpu"))["attention"].startswith("xformers")


def test_a_sheet_of_random_seeds_says_that_others_will_be_made(tmp_path, caplog):
    requests = [replace(request(seed=seed), seed_given=False) for seed in (1, 2)]
    picture = np.zeros((8, 8, 3), np.uint8)
    for name, shown, says in (("random", requests, True), ("one", requests[:1], False), ("mixed", [request(), requests[0]], True)):
        save_picture(tmp_path / f"{name}.png", picture, recorder(tmp_path).of_batch(shown))
        caplog.clear()
        warn_of_changes(str(tmp_path / f"{name}.png"), recorder(tmp_path).metadata(request()))
        assert ("shows results of random seeds" in caplog.text) is says


def test_strange_values_of_a_file_are_no_traceback(tmp_path):
    strange = {"flags": {"a": [1]}, "lora": [{"file": ["x"]}], "start": {"file": {}}, "versions": {"torch": []}, "random": 5}
    text = {"prompt": "a", "settings": json.dumps(strange)}
    assert identity(text) is not None
    save_picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), text)
    warn_of_changes(str(tmp_path / "a.png"), recorder(tmp_path).metadata(request()))
    assert "made with: torch []" in described(str(tmp_path / "a.png"))
    save_picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {"settings": "damaged"})
    assert described(str(tmp_path / "a.png")) == str(tmp_path / "a.png")

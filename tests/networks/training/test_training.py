"""hv_train_network.py: what it learns and what it writes; what it refuses is in test_training_refusals.py."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import hunyuan_model
import hv_train_network
from dataset import load_dataset_config
from dataset.batches.batches import read_batch
from dataset.batches.cached_items import find_cached_items
from networks import network_module
from networks.formats.reading import read_lora
from networks.lora import create_network_from_weights
from networks.merging import merge_patch, read_lora_files
from networks.training.loss.flow_matching import FlowMatching
from networks.training.loss.timestep_sampling import TimestepSampler, TimestepSettings
from networks.training.report.reading import REPORT_FILE
from utils.cli.settings import settings_from
from utils.safetensors_io import read_header, read_tensors

TEXT_WIDTH, POOLED_WIDTH, TEXT_ROWS = 64, 48, 32
CPU = torch.device("cpu")


def trained(tmp_path: Path, name: str = "lora") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def loss_at_fixed_noise(dit: Path, dataset: Path, lora: Path | None) -> float:
    """Mean squared velocity error over all items at four timesteps, with the same noise at every call."""
    patch = merge_patch(read_lora_files([lora]), dit) if lora else None
    transformer = hunyuan_model.load_transformer(dit, device=CPU, dtype=torch.float32, patch=patch)
    items = [item for group in find_cached_items(load_dataset_config(dataset)) for item in group.items]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for item in items:
        batch = read_batch([item])
        latents = batch["latents"].float() * 0.476986
        for t in (0.2, 0.4, 0.6, 0.8):
            noise = torch.randn(latents.shape, generator=generator)
            with torch.no_grad():
                velocity = transformer(
                    (1 - t) * latents + t * noise,
                    torch.tensor([1000 * t]),
                    batch["text_states"].float(),
                    batch["text_mask"],
                    batch["text_states_2"].float(),
                    torch.tensor([1000.0]),
                )
            losses.append(torch.nn.functional.mse_loss(velocity, noise - latents).item())
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_real_media_are_learnt_through_the_scripts(call_script, tiny_model, real_media, tmp_path):
    """Two photographs and a film clip: cached, trained for 200 steps; the loss at fixed noise falls by at least 30 %."""
    chosen = {path.stem: path for path in (*real_media.pictures, *real_media.clips)}
    captions = {"astronaut": "an astronaut smiles", "coffee": "a cup of coffee", "bikes": "cyclists pass on a street"}
    for stem, caption in captions.items():
        folder = tmp_path / ("clips" if chosen[stem].suffix == ".mp4" else "pictures")
        folder.mkdir(exist_ok=True)
        shutil.copy(chosen[stem], folder)
        (folder / f"{stem}.txt").write_text(caption, encoding="utf-8")
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(
        f"[general]\nresolution = [64, 64]\nenable_bucket = true\n"
        f"[[datasets]]\nimage_directory = '{tmp_path / 'pictures'}'\n"
        f"[[datasets]]\nvideo_directory = '{tmp_path / 'clips'}'\ntarget_frames = [5]\n",
        encoding="utf-8",
    )
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert call_script("cache_latents", "--dataset_config", dataset, "--vae", tiny_model.vae).status == 0
    assert call_script("cache_text_encoder_outputs", "--dataset_config", dataset, *encoders).status == 0
    flags = "--learning_rate 3e-3 --network_dim 32 --network_alpha 32 --timestep_sampling uniform --max_train_steps 200"
    output = ("--output_dir", tmp_path / "out", "--output_name", "real", "--seed", 42, "--max_data_loader_n_workers", 0)
    ended = call_script("hv_train_network", "--dit", tiny_model.dit, "--dataset_config", dataset, *flags.split(), *output)
    assert ended.status == 0, ended.stderr

    before = loss_at_fixed_noise(tiny_model.dit, dataset, None)
    after = loss_at_fixed_noise(tiny_model.dit, dataset, tmp_path / "out" / "real.safetensors")
    assert after < 0.7 * before, f"{before:.3f} -> {after:.3f}"


def test_saved_lora_is_the_same_merged_and_injected(train, tiny_model, tmp_path):
    assert train("--max_train_steps", 3, "--learning_rate", 1e-2).status == 0
    path = tmp_path / "out" / "lora.safetensors"
    generator = torch.Generator().manual_seed(5)
    inputs = (
        torch.randn(1, 16, 2, 4, 6, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 9, TEXT_WIDTH, generator=generator),
        torch.ones(1, 9),
        torch.randn(1, POOLED_WIDTH, generator=generator),
        torch.tensor([6000.0]),
    )
    load = {"device": CPU, "dtype": torch.float32}
    with torch.no_grad():
        plain = hunyuan_model.load_transformer(tiny_model.dit, **load)(*inputs)
        loading = hunyuan_model.load_transformer(tiny_model.dit, **load, patch=merge_patch(read_lora_files([path]), tiny_model.dit))
        merged = hunyuan_model.load_transformer(tiny_model.dit, **load)
        network, weights = create_network_from_weights(1.0, path, None, None, merged, for_inference=True)
        network.merge_to(None, merged, weights)
        injected = hunyuan_model.load_transformer(tiny_model.dit, **load)
        network, _ = create_network_from_weights(1.0, path, None, None, injected, for_inference=True)
        network.apply_to(None, injected, apply_unet=True)
        outputs = [model(*inputs) for model in (loading, merged, injected)]
    assert (outputs[0] - plain).abs().max() > 1e-2
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_does_not_change_the_result(train, tmp_path):
    dropouts = ("--network_dropout", 0.1, "--network_args", "rank_dropout=0.1", "module_dropout=0.1")
    assert train("--max_train_steps", 4, *dropouts, name="kept").status == 0
    assert train("--max_train_steps", 4, *dropouts, "--gradient_checkpointing", name="recomputed").status == 0
    kept, recomputed = trained(tmp_path, "kept"), trained(tmp_path, "recomputed")
    for name in kept:
        torch.testing.assert_close(recomputed[name], kept[name], atol=1e-6, rtol=1e-5)


def test_what_is_saved_and_when(train, tmp_path):
    # Four pictures in batches of two (2 + 1 batches) and one clip: four batches an epoch, two steps when accumulating two.
    flags = ("--max_train_epochs", 3, "--gradient_accumulation_steps", 2, "--save_every_n_epochs", 1, "--save_every_n_steps", 3)
    assert train(*flags, "--network_dim", 2, "--training_comment", "a côté").status == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    saved = ["lora-000001", "lora-000002", "lora-step00000003", "lora", "lora_comfyui"]
    assert names == [*(f"{name}.safetensors" for name in saved), REPORT_FILE]
    metadata = read_header(tmp_path / "out" / "lora.safetensors").metadata
    expected = {
        "ss_base_model_version": "hunyuan_video",
        "ss_output_name": "lora",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_num_train_items": "5",
        "ss_num_batches_per_epoch": "4",
        "ss_num_epochs": "3",
        "ss_max_train_steps": "6",
        "ss_steps": "6",
        "ss_epoch": "3",
        "ss_seed": "3",
        "ss_training_comment": "a côté",
        "ss_mixed_precision": "no",
        "ss_sd_model_name": "dit.safetensors",
        "modelspec.architecture": "hunyuan-video/lora",
        "modelspec.title": "lora",
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert [entry["batch_size"] for entry in json.loads(metadata["ss_datasets"])] == [2, 1]
    first = read_header(tmp_path / "out" / "lora-000001.safetensors").metadata
    assert (first["ss_steps"], first["ss_epoch"]) == ("2", "1")


def test_fp8_base_in_bf16_trains_close_to_float32(train, tmp_path):
    flags = ("--max_train_steps", 4, "--timestep_sampling", "uniform")
    assert train(*flags, name="full").status == 0
    assert train(*flags, "--fp8_base", "--mixed_precision", "bf16", "--gradient_checkpointing", name="small").status == 0
    full, small = trained(tmp_path, "full"), trained(tmp_path, "small")
    assert all(small[name].dtype == torch.bfloat16 for name in small if not name.endswith("alpha"))
    ups = [name for name in full if name.endswith("lora_up.weight")]
    flat = [torch.cat([tensors[name].float().flatten() for name in ups]) for tensors in (full, small)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.8


@pytest.mark.slow
def test_command_of_the_readme_trains(tiny_model, cached, tmp_path):
    """accelerate launch, bf16, fp8 weights, an 8-bit optimizer, checkpointing and worker processes together."""
    import os
    import subprocess

    pytest.importorskip("bitsandbytes")
    flags = (
        "--sdpa --mixed_precision bf16 --fp8_base --optimizer_type adamw8bit --learning_rate 1e-3 --gradient_checkpointing "
        "--max_data_loader_n_workers 2 --persistent_data_loader_workers --network_module networks.lora --network_dim 32 "
        "--timestep_sampling sigmoid --discrete_flow_shift 1.0 --max_train_epochs 2 --save_every_n_epochs 1 --seed 42"
    )
    paths = ("--dit", tiny_model.dit, "--dataset_config", cached, "--output_dir", tmp_path / "out", "--output_name", "lora")
    launch = ("-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16")
    script = Path(hv_train_network.__file__)
    ended = subprocess.run(
        [sys.executable, *launch, str(script), *map(str, paths), *flags.split()],
        cwd=script.parent,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"} if not torch.cuda.is_available() else None,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["lora-000001.safetensors", "lora.safetensors", "lora_comfyui.safetensors", REPORT_FILE]
    assert "--discrete_flow_shift" not in ended.stderr  # 1.0 is the default: nothing to warn about
    read_lora(tmp_path / "out" / "lora.safetensors")


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt"])
def test_what_the_model_is_told_and_compared_with(monkeypatch, cached, scheme):
    """A perfect prediction has no loss; the model hears 1000 t and 1000 times the guidance, and noisy scaled latents."""
    heard = []
    batch = read_batch(find_cached_items(load_dataset_config(cached, require_media=False))[0].items[3:4])
    latents = batch["latents"] * 0.476986
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(11))

    class Perfect(torch.nn.Module):
        config = types.SimpleNamespace(guidance=True)
        error = 0.0

        def forward(self, x, t, text_states, text_mask, text_states_2, guidance):
            heard.append((x, t, guidance))
            return noise - latents + self.error

    arguments = f"--dit x --dataset_config x --output_dir x --output_name x --timestep_sampling sigma --weighting_scheme {scheme}"
    args = hv_train_network.build_parser().parse_args([*arguments.split(), "--guidance_scale", "3"])
    flow_matching = FlowMatching(
        Perfect(),
        hv_train_network.Accelerator(cpu=True),
        TimestepSampler(settings_from(TimestepSettings, args), torch.Generator().manual_seed(1)),
        noise=torch.Generator().manual_seed(11),
        dtype=torch.float32,
        guidance_scale=args.guidance_scale,
    )
    assert flow_matching.loss_at(batch, *flow_matching.sample(batch["latents"].shape)) == 0
    x, t, guidance = heard[0]
    assert 0 < t.item() <= 1000 and guidance.item() == 3000
    torch.testing.assert_close(x, (1 - t / 1000) * latents + t / 1000 * noise)
    flow_matching.transformer.error = 0.5
    flow_matching.noise.manual_seed(11)
    loss, sigma = flow_matching.loss_at(batch, *flow_matching.sample(batch["latents"].shape)).item(), heard[-1][1].item() / 1000
    assert loss == pytest.approx(0.25 / sigma**2 if scheme == "sigma_sqrt" else 0.25, rel=1e-4)


def test_a_third_party_network_needs_only_the_core_of_the_contract(train, monkeypatch, tmp_path):
    module = types.ModuleType("foreign_network")

    class Foreign(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
            assert text_encoder is None and apply_unet and not apply_text_encoder
            self.shift = torch.nn.Parameter(torch.zeros(self.layer.out_features))  # as some modules do, not before
            forward = self.layer.forward
            self.layer.forward = lambda x: forward(x) + self.shift

        def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
            return [{"params": [self.shift], "lr": unet_lr}]

        def save_weights(self, file, dtype, metadata):
            save_file({"shift": self.shift.detach().to(dtype)}, file, metadata)

    def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **network_args):
        assert (network_dim, network_alpha, network_args) == (5, 2.0, {"algo": "shift"})
        layers = [layer for layer in unet.modules() if type(layer).__name__ == "Linear"]
        network = Foreign(layers[-1])
        del network._modules["layer"]
        network.__dict__["layer"] = layers[-1]
        return network

    module.create_network = create_network
    monkeypatch.setitem(sys.modules, "foreign_network", module)
    flags = ("--network_module", "foreign_network", "--network_dim", 5, "--network_alpha", 2, "--network_args", "algo=shift")
    ended = train("--max_train_steps", 2, "--learning_rate", 0.1, *flags, "--save_state")
    assert ended.status == 0, ended.stderr
    assert trained(tmp_path)["shift"].abs().max() > 0.01
    ended = train("--max_train_steps", 3, "--learning_rate", 0.1, *flags, "--resume", tmp_path / "out" / "lora-state")
    assert ended.status == 0, ended.stderr


def test_a_third_party_network_loads_its_weights_also_with_dim_from_weights(tiny_model, tmp_path):
    module, loaded = types.ModuleType("foreign_network"), []

    class Foreign(torch.nn.Linear):
        def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True): ...

        def load_weights(self, file):
            loaded.append(file)

    module.create_network_from_weights = lambda *args, **kwargs: (Foreign(2, 2), {})
    transformer = hunyuan_model.load_transformer(tiny_model.dit, device=CPU, dtype=torch.float32)
    options = {"dim": None, "alpha": 1.0, "dropout": None, "network_args": {}}
    network_module.create_network(module, transformer, **options, weights="w.safetensors", dim_from_weights=True)
    assert loaded == ["w.safetensors"]


def test_metadata_holds_no_path_of_this_machine(train, tiny_model, tmp_path):
    assert train("--max_train_steps", 1).status == 0
    metadata = read_header(tmp_path / "out" / "lora.safetensors").metadata
    folders = {json.dumps(str(folder))[1:-1] for folder in (tmp_path, tiny_model.dit.parent)} | {str(tmp_path)}
    assert not [key for key, value in metadata.items() if any(folder in value for folder in folders)]
    pictures, clips = json.loads(metadata["ss_datasets"])
    assert pictures["directory"] == "gone" and "target_frames" not in pictures and clips["target_frames"] == [5]


def test_show_timesteps_needs_no_model(call_script, tmp_path):
    flags = ("--timestep_sampling", "shift", "--discrete_flow_shift", 7)
    console = call_script("hv_train_network", "--show_timesteps", "console", *flags)
    assert console.status == 0 and "0-50" in console.stdout
    image = call_script("hv_train_network", "--show_timesteps", "image", *flags, "--output_dir", tmp_path / "out")
    assert image.status == 0 and (tmp_path / "out" / "timesteps.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_caption_trains(train, tmp_path):
    path = tmp_path / "pictures" / "a_hv_te.safetensors"
    file = read_tensors(path)
    save_file(file.tensors | {"llm_mask": torch.zeros(TEXT_ROWS, dtype=torch.int64)}, path)
    ended = train("--max_train_epochs", 1)
    assert ended.status == 0, ended.stderr

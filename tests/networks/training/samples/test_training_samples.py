"""networks.training.samples.sampling: when samples are made, what is written, that training is not changed, what is refused."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

import hunyuan_model
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from networks.lora import create_network
from networks.training.arguments import build_training_parser
from networks.training.samples import sampling as training_samples
from networks.training.samples.arguments import sample_settings
from networks.training.samples.sampling import SampleSettings, check_samples, prepare_samples
from utils.errors import UserError

CPU = torch.device("cpu")
PROMPTS = "a red ball --w 48 --h 32 --d 7 --s 2\na blue cube --w 32 --h 32 --f 5 --s 2 --g 1 --fs 3\n"


def parsed(*flags: object) -> SampleSettings:
    return sample_settings(build_training_parser().parse_args([str(flag) for flag in flags]), CPU)


@pytest.fixture
def sampling(tiny_model, tmp_path):
    """``sampling(*flags)``: the flags of a training that samples two prompts every second step."""
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")

    def arguments(*flags: object) -> SampleSettings:
        encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
        output = ("--output_dir", tmp_path / "out", "--output_name", "lora")
        prompts = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 2, "--vae", tiny_model.vae)
        return parsed("--dit", tiny_model.dit, *prompts, *encoders, *output, *flags)

    return arguments


class Averaging(torch.optim.AdamW):
    """Shows an average of the weights in evaluation mode; like real schedule-free optimizers it comes back only almost."""

    def step(self, closure=None):
        assert self.training_mode
        return super().step(closure)

    def _scale(self, factor: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(factor)

    def train(self) -> None:
        if not getattr(self, "training_mode", True):
            self._scale(1 / 0.7)
        self.training_mode = True

    def eval(self) -> None:
        if getattr(self, "training_mode", True):
            self._scale(0.7)
        self.training_mode = False


class TinyTraining:
    """A training of a few steps on random latents, with every dropout, with all its noise from the global generators."""

    def __init__(self, dit: Path, optimizer_class: type = torch.optim.AdamW):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True)
        self.transformer = hunyuan_model.load_transformer(dit, device=CPU, dtype=torch.float32)
        enable_gradient_checkpointing(self.transformer)
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        options = {"neuron_dropout": 0.2, "rank_dropout": "0.2", "module_dropout": "0.2"}
        self.network = create_network(1.0, 4, 4.0, None, None, self.transformer, **options)
        self.network.apply_to(None, self.transformer)
        self.network.requires_grad_(True).train()
        inner = optimizer_class(self.network.parameters(), lr=1e-2)
        inner.training_mode = True
        self.optimizer = self.accelerator.prepare(inner)
        self.losses: list[float] = []

    def step(self) -> None:
        latents = torch.randn(1, 16, 1, 4, 4)
        velocity = self.transformer(
            latents,
            torch.tensor([1000 * random.random()]),
            torch.from_numpy(np.random.standard_normal((1, 5, 64))).float(),
            torch.ones(1, 5),
            torch.randn(1, 48),
            torch.tensor([1000.0]),
        )
        loss = (velocity - torch.randn_like(velocity)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def samples(self, settings: SampleSettings) -> training_samples.TrainingSamples:
        return prepare_samples(settings, check_samples(settings), self.accelerator, self.transformer.config, seed=2**32 - 1)

    def sample(self, samples: training_samples.TrainingSamples, step: int = 2, **options: object):
        return samples.sample_if_due(self.transformer, self.network, self.optimizer, torch.float32, step=step, epoch=1, **options)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.network.state_dict().items()}


def states_of(training: TinyTraining) -> tuple:
    modules = [*training.transformer.modules(), *training.network.modules()]
    return (
        [module.training for module in modules],
        [parameter.requires_grad for module in modules for parameter in module.parameters(recurse=False)],
        [parameter.grad is None for parameter in training.network.parameters()],
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


def test_samples_change_nothing_in_a_training(sampling, tiny_model):
    plain = TinyTraining(tiny_model.dit, Averaging)
    for _ in range(4):
        plain.step()
    sampled = TinyTraining(tiny_model.dit, Averaging)
    samples = sampled.samples(sampling("--sample_at_first"))
    for step in range(5):
        before = states_of(sampled)
        weights = sampled.state()
        assert len(sampled.sample(samples, step)) == (2 if step % 2 == 0 else 0)
        assert states_of(sampled) == before
        assert all(torch.equal(weights[name], tensor) for name, tensor in sampled.state().items())
        if step < 4:
            sampled.step()
    assert sampled.losses == plain.losses
    after = sampled.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in plain.state().items())


def test_what_is_written(sampling, tiny_model, tmp_path, caplog):
    training = TinyTraining(tiny_model.dit)
    samples = training.samples(sampling())
    with caplog.at_level(logging.INFO):
        picture, clip = training.sample(samples)
    folder = tmp_path / "out" / "sample"
    assert sorted(folder.iterdir()) == [picture.path, clip.path]
    assert picture.path.match("lora_000002_00_*_7.png") and clip.path.match("lora_000002_01_*_0.mp4")  # one more than the training
    assert (picture.index, clip.index) == (0, 1)
    with Image.open(picture.path) as file:
        assert file.size == (48, 32)
        assert file.text["prompt"] == "a red ball" and file.text["seed"] == "7" and file.text["training_steps"] == "2"
    with av.open(str(clip.path)) as container:
        assert container.streams.video[0].average_rate == 24
        assert len(list(container.decode(video=0))) == 5
        assert "seed: 0" in container.metadata["comment"]
    assert "2 of 2 samples in" in caplog.text


def test_names_of_epochs_and_of_a_second_round(sampling, tiny_model, monkeypatch):
    monkeypatch.setattr(training_samples.time, "strftime", lambda *_: "20250101120000")
    training = TinyTraining(tiny_model.dit)
    args = sampling("--sample_every_n_epochs", 1, "--no_metadata")
    (Path(args.sample_prompts)).write_text("a ball --w 32 --h 32 --s 1 --d 5", encoding="utf-8")
    samples = training.samples(args)
    names = [sample.path.name for sample in training.sample(samples, 2, epoch_ended=True)]
    assert names == ["lora_e000001_00_20250101120000_5.png"]
    assert training.sample(samples, 2) == [], "the same step is not sampled twice"
    samples.sampled_at = None
    (again,) = training.sample(samples, 2, epoch_ended=True)
    assert again.path.name == "lora_e000001_00_20250101120000_5-2.png", "nothing is overwritten"
    with Image.open(again.path) as file:
        assert not file.text


@pytest.mark.parametrize(
    ("options", "flags"),
    [("", ()), ("--n blue and dark --l 4", ("--negative_prompt", "blue and dark", "--guidance_scale", 4))],
    ids=["plain", "guided"],
)
def test_a_sample_is_what_generation_makes_with_the_same_network(sampling, tiny_model, call_script, tmp_path, options, flags):
    training, given = TinyTraining(tiny_model.dit), sampling()
    (tmp_path / "prompts.txt").write_text(f"a red ball --w 48 --h 32 --d 7 --s 2 {options}", encoding="utf-8")
    for _ in range(2):
        training.step()
    lora = tmp_path / "lora.safetensors"
    training.network.save_weights(lora, torch.float32, None)
    (picture,) = training.sample(training.samples(given))
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    models = ("--dit", tiny_model.dit, "--vae", tiny_model.vae, *encoders, "--prompt", "a red ball", "--seed", 7)
    size = ("--video_size", 32, 48, "--video_length", 1, "--infer_steps", 2, "--flow_shift", 14.5, "--output_type", "images")
    for folder, network in (("with", ("--lora_weight", lora)), ("without", ())):
        ended = call_script("hv_generate_video", *models, *size, "--save_path", tmp_path / folder, *network, *flags)
        assert ended.status == 0, ended.stderr
    found = [np.asarray(Image.open(path)).astype(int) for path in (picture.path, *sorted(tmp_path.glob("with*/*/*.png")))]
    assert np.abs(found[0] - found[1]).max() <= 1, "the network is merged there and hooked in here"
    assert np.abs(found[0] - found[2]).max() > 1, "the network changes the picture"
    with Image.open(picture.path) as file:
        assert file.text.get("negative_prompt") == ("blue and dark" if options else None)


class TestFailures:
    """Training continues whatever happens, and one line names the prompt."""

    @pytest.fixture
    def training(self, tiny_model) -> TinyTraining:
        return TinyTraining(tiny_model.dit)

    def sampled(self, training, settings, caplog):
        samples = training.samples(settings)
        before = states_of(training)
        with caplog.at_level(logging.WARNING):
            saved = training.sample(samples)
        assert states_of(training) == before
        training.step()
        return saved, [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (torch.OutOfMemoryError("CUDA out of memory.\nand more"), "out of memory while sampling; make it smaller or shorter"),
            (RuntimeError("an odd\nerror"), "an odd; training continues"),
        ],
    )
    def test_a_prompt_that_cannot_be_sampled(self, training, sampling, caplog, monkeypatch, error, says):
        plain, calls = training_samples.generate_latents, []

        def first_fails(*args, **kwargs):
            calls.append(1)
            if len(calls) == 1:
                torch.rand(3)
                raise error
            return plain(*args, **kwargs)

        monkeypatch.setattr(training_samples, "generate_latents", first_fails)
        saved, warnings = self.sampled(training, sampling(), caplog)
        assert [sample.index for sample in saved] == [1]
        (warning,) = warnings
        assert says in warning and "line 1: 'a red ball'" in warning and "was not made" in warning and "\n" not in warning

    def test_a_network_that_gives_nan(self, training, sampling, caplog):
        with torch.no_grad():
            next(training.network.loras()).lora_up.weight.fill_(torch.nan)
        saved, warnings = self.sampled(training, sampling(), caplog)
        assert saved == [] and len(warnings) == 2 and all("NaN" in warning for warning in warnings)
        assert not list(Path(sampling().output_dir).rglob("*.*"))

    @pytest.mark.parametrize(
        ("name", "says", "left"),
        [("load_decoder", "no sample was written", []), ("save_picture", "a red ball", [1])],
    )
    def test_a_vae_that_is_gone_and_a_disk_that_is_full(self, training, sampling, caplog, monkeypatch, name, says, left):
        def fails(*_args, **_options):
            raise UserError("No space left on device.")

        monkeypatch.setattr(training_samples, name, fails)
        saved, (warning,) = self.sampled(training, sampling(), caplog)
        assert [sample.index for sample in saved] == left
        assert says in warning and "No space left on device; training continues" in warning

    def test_a_stop_that_is_asked_for_gives_the_samples_up(self, training, sampling):
        samples, asked = training.samples(sampling()), []

        def stop() -> bool:
            asked.append(1)
            return len(asked) == 3  # in the middle of the second prompt

        before = states_of(training)
        assert training.sample(samples, stop=stop) == []
        assert len(asked) == 3 and states_of(training) == before


class TestSampledTogether:
    """All processes compute each sample, as where they share sharded weights."""

    @pytest.fixture
    def round_of(self, sampling, tiny_model, monkeypatch):
        training = TinyTraining(tiny_model.dit)
        prompts = training.samples(sampling()).prompts

        def of(main: bool = True, stop_elsewhere: bool = False) -> list:
            monkeypatch.setattr(Accelerator, "is_main_process", main)
            monkeypatch.setattr(Accelerator, "reduce", lambda _, value: value + stop_elsewhere)
            arguments = (sampling(), training.accelerator, training.transformer, torch.float32, "000002", 2, lambda: False)
            with torch.no_grad():
                return training_samples.SampleRound(*arguments, together=True).run(prompts)

        return of

    def test_the_main_process_writes(self, round_of, sampling):
        assert round_of(main=False) == [] and not list(Path(sampling().output_dir).rglob("*.*"))
        assert [sample.index for sample in round_of()] == [0, 1]

    def test_a_stop_of_any_process_is_one_of_all(self, round_of):
        assert round_of(stop_elsewhere=True) == []

    def test_what_fails_in_one_process_ends_the_training(self, round_of, monkeypatch):
        def fails(*_args, **_options):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(training_samples, "generate_latents", fails)
        with pytest.raises(UserError, match="out of memory while sampling"):
            round_of()

    def test_samples_that_are_not_finite_do_not(self, round_of, monkeypatch):
        monkeypatch.setattr(training_samples, "generate_latents", lambda *_args, **_options: torch.full((1,), torch.nan))
        assert round_of() == []


def test_encoders_are_loaded_once_before_the_transformer_and_move_no_generator(sampling, tiny_model, monkeypatch):
    training, args = TinyTraining(tiny_model.dit), sampling()
    before = states_of(training)
    samples = training.samples(args)
    assert states_of(training) == before
    monkeypatch.setattr(hunyuan_model, "encode_prompts", lambda *_a, **_k: pytest.fail("encoded again"), raising=False)
    assert len(training.sample(samples, 2)) == 2 and len(training.sample(samples, 4)) == 2
    load = {"device": CPU, "dtype": torch.float32}
    states, mask = hunyuan_model.load_text_encoder_1(tiny_model.text_encoder1, **load).encode(["a red ball"])
    pooled = hunyuan_model.load_text_encoder_2(tiny_model.text_encoder2, **load).encode(["a red ball"])
    for found, expected in zip(samples.prompts[0].text, (states, mask, pooled)):
        torch.testing.assert_close(found, expected)


def test_encoders_of_another_model_are_refused(sampling, tiny_model):
    training, args = TinyTraining(tiny_model.dit), sampling()
    training.transformer.config = replace(training.transformer.config, pooled_dim=768)
    with pytest.raises(UserError, match=r"--text_encoder2 gives vectors of 48 numbers, the transformer in --dit takes 768"):
        training.samples(args)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_makes_a_share_and_the_main_one_speaks_for_all(sampling, tiny_model, monkeypatch, caplog, rank):
    training, args, mine = TinyTraining(tiny_model.dit), sampling(), 1 - rank  # the second one costs more
    alone = training.samples(args).prompts
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "process_index", rank)
    monkeypatch.setattr(Accelerator, "is_main_process", rank == 0)
    monkeypatch.setattr(training_samples, "broadcast_object_list", lambda _said: [alone])
    other = training_samples.SavedSample(Path("theirs.png"), 1 - mine, alone[1 - mine].prompt)
    said = [([other], ["sample 01 was not made: no memory; training continues."])]
    monkeypatch.setattr(training_samples, "gather_object", lambda own: own + said if rank == 0 else said + own)
    if rank:
        monkeypatch.setattr(hunyuan_model, "encode_prompts", lambda *_a, **_k: pytest.fail("encoded"), raising=False)
    samples = training.samples(args)
    assert [entry.index for entry in samples.prompts] == [mine]
    with caplog.at_level(logging.INFO):
        saved = training.sample(samples, 2)
    assert [sample.index for sample in saved] == [0, 1] and saved[1 - mine] is other
    assert [path.name for path in Path(args.output_dir).rglob("lora_*")] == [saved[mine].path.name]
    if rank == 0:
        assert "saved theirs.png" in caplog.text and "sample 01 was not made: no memory" in caplog.text


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        (("--sample_every_n_steps", 6), ["000006", "000012"]),
        (("--sample_every_n_epochs", 2, "--sample_every_n_steps", 99), ["e000002"]),
        (
            ("--sample_at_first", "--sample_every_n_steps", 5, "--sample_every_n_epochs", 1),
            ["000000", "e000001", "000005", "e000002", "000010", "e000003"],
        ),
    ],
)
def test_when_samples_are_due(sampling, flags, due):
    """Three epochs of four steps."""
    settings = sampling(*flags)
    found = [settings.due(step, max(1, -(-step // 4)), step > 0 and step % 4 == 0) for step in range(13)]
    assert [name for name in found if name] == due


@pytest.fixture
def nothing_loads(monkeypatch):
    for name in ("load_text_encoder_1", "load_text_encoder_2", "load_vae", "load_transformer", "encode_prompts"):
        monkeypatch.setattr(hunyuan_model, name, lambda *_a, **_k: pytest.fail("a model was loaded"), raising=False)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--sample_prompts", "none.txt"), "none.txt does not exist"),
        (("--vae", "none.pt"), "--vae"),
        (("--text_encoder1", "nowhere"), "--text_encoder1"),
        (("--output_name", "x" * 205), "--output_name is too long for the names of samples"),
    ],
)
def test_flags_that_are_refused_before_anything_loads(sampling, nothing_loads, flags, says):
    with pytest.raises(UserError) as error:
        check_samples(sampling(*flags))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--sample_every_n_steps", 1), "--sample_every_n_steps needs --sample_prompts"),
        (("--sample_prompts", "p.txt"), "--sample_prompts needs --vae, --text_encoder1, --text_encoder2,"),
    ],
)
def test_flags_without_their_partners_are_refused(flags, says):
    with pytest.raises(UserError) as error:
        parsed(*flags)
    assert says in str(error.value)


def test_a_folder_that_cannot_be_written_is_refused(sampling, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="the folder sample of --output_dir"):
        check_samples(sampling())


def test_prompts_that_nothing_asks_for_have_no_effect(sampling):
    settings = replace(sampling(), sample_every_n_steps=None)
    assert check_samples(settings) == []
    assert settings.without_effect()[0].startswith("--sample_prompts has no effect without --sample_at_first or")


def test_a_training_without_samples_makes_none(tiny_model):
    settings = parsed("--dit", tiny_model.dit)
    assert check_samples(settings) == [] and settings.due(2, 1) is None

"""Checkpoints as people have them, and what of them cannot be taken."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trak_ext
from trak_ext.inputs.checkpoints import Checkpoints

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3))


def state_of(seed):
    torch.manual_seed(seed)
    return net().state_dict()


def taken(source, model=None):
    return Checkpoints(net() if model is None else model, [source]).load(0, torch.device("cpu"))


def assert_is(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- files of training frameworks, and prefixes ---------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_weights_in_a_frameworks_file_are_taken(key, tmp_path):
    whole = {"epoch": 3, key: state_of(1), "optimizer": {"state": {0: torch.ones(2)}, "lr": 0.1}}
    torch.save(whole, tmp_path / "last.ckpt")
    assert_is(taken(tmp_path / "last.ckpt"), state_of(1))
    with pytest.raises(ValueError, match=rf"has one as '{key}' \(give checkpoint\['{key}'\]\)"):
        taken(whole)


def test_two_of_them_are_refused(tmp_path):
    torch.save({"model": state_of(1), "state_dict": state_of(2)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"expected one state dict in .* got state_dict and m"):
        taken(tmp_path / "two.pt")


PREFIXES = {
    "DataParallel": lambda key: f"module.{key}",
    "twice": lambda key: f"module.module.{key}",
    "compile": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "the other way": lambda key: f"_orig_mod.module.{key}",
    "compiled layers": lambda key: key.replace("0.", "0._orig_mod.").replace("3.", "3._orig_mod."),
    "a framework's module": lambda key: f"model.{key}",
    "another name": lambda key: f"classifier.{key}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("in_file", [False, True])
def test_prefixes_of_wrappers_are_taken_off(prefix, in_file, tmp_path):
    source = {PREFIXES[prefix](key): tensor for key, tensor in state_of(1).items()}
    if in_file:
        torch.save({"state_dict": source}, tmp_path / "a.pt")
        source = tmp_path / "a.pt"
    assert_is(taken(source), state_of(1))


def test_a_models_own_module_named_module_keeps_its_name():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 3)

    state = Own().state_dict()
    assert_is(taken(state, Own()), state)
    assert_is(taken({f"module.{k}": v for k, v in state.items()}, Own()), state)


# --- folders --------------------------------------------------------------------------------------


def shards(folder, suffix, write):
    state = state_of(1)
    names = sorted(state)
    places = {}
    for i, part in enumerate((names[:4], names[4:])):
        file = f"part-{i}.{suffix}"
        write({name: state[name].contiguous() for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    return json.dumps({"metadata": {}, "weight_map": places})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_hugging_face(kind, sharded, tmp_path):
    write = save_file if kind == "safetensors" else torch.save
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    if sharded:
        (tmp_path / f"{name}.index.json").write_text(shards(tmp_path, kind, write))
        assert_is(taken(tmp_path / f"{name}.index.json"), state_of(1))
    else:
        write(state_of(1), tmp_path / name)
    assert_is(taken(tmp_path), state_of(1))
    assert_is(taken(str(tmp_path)), state_of(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"expected JSON in .*index.json', got a file that does not load"),
        ("[]", r"expected a JSON object in .*index.json'"),
        ("{}", r"expected a 'weight_map' in .*, got none"),
        ('{"weight_map": {"0.bias": "../other.bin"}}', r"expected the shard '../other.bin' beside"),
        ('{"weight_map": {"0.bias": "gone.bin"}}', r"expected the shard 'gone.bin' beside"),
        ('{"weight_map": {"9.bias": "one.bin"}}', r"expected 9.bias in 'one.bin' as .*, got none"),
    ],
)
def test_a_broken_index_is_refused_by_name(text, message, tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    torch.save(state_of(1), tmp_path / "one.bin")
    with pytest.raises((ValueError, FileNotFoundError), match=r"checkpoints\[0\]: " + message):
        taken(tmp_path)


def test_another_folder_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "weights.txt").write_text("0")
    message = r"or a folder with one of model.safetensors, .* got the folder .* without"
    with pytest.raises(FileNotFoundError, match=message):
        taken(tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_programs_are_refused_in_one_sentence(tmp_path):
    torch.jit.script(nn.Linear(4, 3)).save(str(tmp_path / "script.pt"))
    with pytest.raises(
        ValueError, match=r"a file that does not load \(\w+: .*TorchScript"
    ) as error:
        taken(tmp_path / "script.pt")
    assert "\n" not in str(error.value)


def test_a_saved_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    saved, model = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    for size in ("5GB", "2KB"):
        saved.save_pretrained(tmp_path / size, max_shard_size=size)
        found = taken(tmp_path / size, model)
        assert torch.equal(found["lm_head.weight"], saved.lm_head.weight)  # tied, and left out
        assert torch.equal(found["transformer.wpe.weight"], saved.transformer.wpe.weight)


# --- adapters -------------------------------------------------------------------------------------


def adapted(seed, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("body", nn.Linear(4, 5))
    base.add_module("head", nn.Linear(5, 3))
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ["body"], **options}, init_lora_weights=False
    )
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}, {"use_rslora": True}])
def test_an_adapters_folder_is_taken_by_a_model_with_adapters(options, tmp_path):
    trained, model = adapted(1, **options), adapted(2, **options)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    trained.save_pretrained(str(tmp_path))
    found = taken(tmp_path, model)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(found[name], tensor), name
    expected, got = (
        _scores(model, [source]) for source in (trained.state_dict(), tmp_path)
    )  # fmt: skip
    assert torch.equal(got, expected)


def _scores(model, checkpoints):
    attributor = trak_ext.Attributor(
        copy.deepcopy(model),
        "image_classification",
        checkpoints=checkpoints,
        proj_dim=16,
        progress=False,
    )
    attributor.fit([(X, Y)])
    return attributor.attribute([(X[:3], Y[:3])])


def test_an_adapter_of_other_settings_is_refused(tmp_path):
    adapted(1, lora_alpha=8).save_pretrained(str(tmp_path))
    message = r"expected an adapter with lora_alpha = 4 as the model's, got 8 in"
    with pytest.raises(ValueError, match=message):
        taken(tmp_path, adapted(2))


def test_an_adapter_for_a_model_without_is_refused(tmp_path):
    adapted(1).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a model with one active adapter .*get_peft"):
        taken(tmp_path)


# --- what is no parameter and no buffer -----------------------------------------------------------


class WithExtra(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.extra = extra

    def forward(self, x):
        return self.layer(x) * 2

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


EXTRAS = {
    "number": (2, 3),
    "tensor": (torch.ones(2), torch.zeros(2)),
    "dtype": (torch.ones(2), torch.ones(2).double()),
    "nested": ({"scale": [torch.ones(1), "a"]}, {"scale": [torch.ones(1), "b"]}),
    "missing key": ({"a": 1, "b": 2}, {"a": 1}),
    "nothing": (None, 1),
}


@pytest.mark.parametrize("kind", EXTRAS)
def test_extra_state_that_differs_is_refused(kind):
    own, other = EXTRAS[kind]
    model = WithExtra(own)
    assert "layer.weight" in taken(WithExtra(copy.deepcopy(own)).state_dict(), model)
    with pytest.raises(ValueError, match=r"expected _extra_state as the model has it, since it is"):
        taken(WithExtra(other).state_dict(), model)


class Packed(nn.Module):
    """Keeps int8 weights where state_dict() finds them and nobody else."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.packed = [torch.randint(-9, 9, (3, 4), generator=generator, dtype=torch.int8)]
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x @ self.packed[0].float().T * self.scale

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = self.packed[0]


def test_packed_weights_that_differ_are_refused():
    assert "scale" in taken(Packed(1).state_dict(), Packed(1))
    with pytest.raises(ValueError, match=r"expected packed as the model has it, since it is"):
        taken(Packed(2).state_dict(), Packed(1))


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_that_differ_are_refused():
    def quantized(seed):
        torch.manual_seed(seed)
        both = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
        return nn.Sequential(torch.ao.quantization.quantize_dynamic(both[:1], {nn.Linear}), both[1])

    try:
        model = quantized(1)
    except (RuntimeError, AttributeError):
        pytest.skip("no quantized kernels here")
    assert "1.weight" in taken(quantized(1).state_dict(), model)
    with pytest.raises(ValueError, match=r"expected 0\.0\._packed_params.* as the model has it"):
        taken(quantized(2).state_dict(), model)


# --- dtypes, and what is handed over --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_checkpoint_of_another_dtype_is_refused(dtype, in_file, tmp_path):
    source = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_of(1).items()}
    if in_file:
        torch.save(source, tmp_path / "a.pt")
        source = tmp_path / "a.pt"
    message = rf"checkpoints\[0\]: expected 0.weight of torch.float32 .* got {dtype}"
    with pytest.raises(ValueError, match=message):
        taken(source)


def test_a_buffer_of_another_dtype_is_refused():
    state = state_of(1)
    state["2.num_batches_tracked"] = state["2.num_batches_tracked"].int()
    with pytest.raises(ValueError, match=r"expected 2.num_batches_tracked of torch.int64 .*int32"):
        taken(state)


def test_what_is_handed_over_stays_as_it_was():
    given = [state_of(1), {f"module.{k}": v for k, v in state_of(2).items()}]
    kept = copy.deepcopy(given)
    _scores(net().train(), given)
    for mine, before in zip(given, kept, strict=True):
        assert_is(mine, before)

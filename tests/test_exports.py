"""What leaves as weights and what enters: golden values are those of stock diffusers and PEFT."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import FakeHub, picture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from side_by_side import PROMPTS, disturb, open_stock, our_images, our_latents, run, same, stock_images
from tiny_families import FAMILIES

from diffalign import hub
from diffalign.cli import main
from diffalign.data.images import encode_png, sha256
from diffalign.data.tables import write_shard
from diffalign.errors import ModelError
from diffalign.models import LoRA
from diffalign.models.lora import KOHYA_FILE, adapter_of

KOHYA = ["sd", "sdxl", "flux-dev", "flux-schnell"]

every_family = pytest.mark.parametrize("name", FAMILIES)


def cli(*args: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.output


def steps(model: Any) -> dict[str, torch.Tensor]:
    """What each layer's adapter adds to its weight: the same for every way to split scale, A and B."""
    weights, alphas = adapter_of(model.net)
    pairs = {n: (weights[f"{n}.lora_A.weight"], weights[f"{n}.lora_B.weight"]) for n in alphas}
    return {n: alphas[n] / len(a) * b.flatten(1) @ a.flatten(1) for n, (a, b) in pairs.items()}


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def rewritten(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **entries: str) -> Path:
    """The same file with its tensors changed, and with these entries alone in its header."""
    save_file(change(read(file)), file, entries)
    return file


def read(file: Path) -> dict[str, torch.Tensor]:
    """Copies: safetensors maps the file itself, which a test is about to overwrite."""
    return {key: value.clone() for key, value in load_file(file).items()}


# --- kohya ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KOHYA)
def test_kohyas_file_gives_the_same_images_in_stock_diffusers_and_comes_back(
    load: Any, stock: Any, tmp_path: Path, name: str
) -> None:
    model, pipe = load(name), stock(name)
    base = our_images(model, 2.5)
    disturb(model)
    file = model.export(tmp_path, "kohya", {"base_model": "the base"})
    assert file == tmp_path / KOHYA_FILE
    state = load_file(file)
    prefix = "lora_transformer_" if name.startswith("flux") else "lora_unet_"
    assert all(re.fullmatch(rf"{prefix}\w+\.(lora_down\.weight|lora_up\.weight|alpha)", key) for key in state)
    assert {v.item() for k, v in state.items() if k.endswith(".alpha")} == {4.0}
    about = header(file)
    assert (about["base_model"], about["ss_network_dim"], float(about["ss_network_alpha"])) == ("the base", "2", 4)

    ours = our_images(model, 2.5)
    pipe.load_lora_weights(tmp_path, weight_name=KOHYA_FILE)
    same(ours, stock_images(pipe, our_latents(model), 2.5), 2.5)
    assert not torch.equal(ours, base)

    back = load(name, lora=LoRA(path=str(file)))
    trained, imported = steps(model), steps(back)
    assert trained.keys() == imported.keys()
    assert all(torch.equal(trained[layer], imported[layer]) for layer in trained)
    if not name.startswith("flux"):  # diffusers' converter for FLUX multiplies the scale into A
        assert all(torch.equal(w, adapter_of(back.net)[0][n]) for n, w in adapter_of(model.net)[0].items())
        assert set(adapter_of(back.net)[1].values()) == {4.0}
    assert torch.equal(our_images(back, 2.5), ours)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_kind_of_layer_of_a_unet_comes_back_from_kohyas_file(load: Any, tmp_path: Path, name: str) -> None:
    layers = ["to_q", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]
    model = load(name, lora=LoRA(rank=3, alpha=6, target_modules=layers))
    disturb(model)
    back = load(name, lora=LoRA(path=str(model.export(tmp_path, "kohya"))))
    trained, imported = steps(model), steps(back)
    assert trained.keys() == imported.keys()
    assert all(torch.equal(trained[layer], imported[layer]) for layer in trained)


def test_kohyas_alphas_count_layer_by_layer(load: Any, stock: Any, tmp_path: Path) -> None:
    """One layer gets an eighth of its alpha, and one twice its rank at the same alpha, which leaves it as it was.

    Stock diffusers would take the other layers' alpha for the first; what we make of the file it reads as we do.
    """
    model = load("sd")
    disturb(model)
    wanted = steps(model)
    file = model.export(tmp_path, "kohya")
    first = min(key.removesuffix(".alpha") for key in load_file(file) if key.endswith(".alpha"))

    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        _, two, *_ = sorted(key.removesuffix(".alpha") for key in state if key.endswith(".alpha"))
        state[f"{first}.alpha"] = torch.tensor(0.5)
        for part, dim in (("lora_down", 0), ("lora_up", 1)):
            whole = state[f"{two}.{part}.weight"]
            state[f"{two}.{part}.weight"] = torch.cat([whole, whole], dim)
        return state

    rewritten(file, change)
    ours = load("sd", lora=LoRA(path=str(file)))
    for layer, step in steps(ours).items():
        share = 1 / 8 if first == f"lora_unet_{layer.replace('.', '_')}" else 1
        torch.testing.assert_close(step, share * wanted[layer])
    for format in ("diffusers", "kohya"):
        again, pipe = ours.export(tmp_path / format, format), stock("sd")
        pipe.load_lora_weights(again.parent, weight_name=again.name)
        same(our_images(ours, 2.5), stock_images(pipe, our_latents(ours), 2.5), 2.5)


def test_kohyas_files_without_alpha_mean_the_rank(load: Any, tmp_path: Path) -> None:
    """As in kohya's scripts. Stock diffusers agrees unless other layers say one, which it then takes for all."""
    model = load("sd")
    file = model.export(tmp_path, "kohya")
    silent = min(key for key in load_file(file) if key.endswith(".alpha"))
    rewritten(file, lambda state: {key: value for key, value in state.items() if key != silent})
    alphas = adapter_of(load("sd", lora=LoRA(path=str(file))).net)[1]
    assert sorted(alphas.values()) == [2.0] + [4.0] * (len(alphas) - 1)


def test_sdxl_adapters_by_stabilitys_block_names_are_read(load: Any, tmp_path: Path) -> None:
    """As kohya's scripts write them: input, middle and output blocks."""
    model = load("sdxl")
    disturb(model)
    file = model.export(tmp_path, "kohya")
    blocks = {
        "down_blocks_0_attentions_0": "input_blocks_1_1",
        "mid_block_attentions_0": "middle_block_1",
        "up_blocks_0_attentions_0": "output_blocks_0_1",
        "up_blocks_0_attentions_1": "output_blocks_1_1",
    }

    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = "|".join(blocks)
        return {re.sub(names, lambda m: blocks[m[0]], key): value for key, value in state.items()}

    back = load("sdxl", lora=LoRA(path=str(rewritten(file, change))))
    assert not any("down_blocks" in key for key in load_file(file))
    assert torch.equal(our_images(back, 2.5), our_images(model, 2.5))


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])
def test_no_kohya_where_stock_diffusers_would_not_read_it(load: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"kohya's keys|does not read|is no part of the transformer"):
        load(name).export(tmp_path, "kohya")
    assert not list(tmp_path.iterdir())


def test_no_kohya_for_layers_that_diffusers_misreads(load: Any, tmp_path: Path) -> None:
    """Its converter for FLUX knows attention alone."""
    model = load("flux-dev", lora=LoRA(rank=2, target_modules=["to_q", "ff.net.2"]))
    with pytest.raises(ModelError, match="stock diffusers"):
        model.export(tmp_path, "kohya")


def test_no_kohya_without_an_adapter(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="all weights were trained"):
        load("sd", lora=None).export(tmp_path, "kohya")


# --- merged ---------------------------------------------------------------------------------------------------------


@every_family
def test_a_merged_pipeline_gives_the_same_images(load: Any, stock: Any, tmp_path: Path, name: str) -> None:
    """W x + s B A x and (W + s B A) x round differently: at most 1/255 in a pixel, and in fewer than one of a hundred."""
    model, pipe = load(name), stock(name)
    latents = our_latents(model)
    base = stock_images(pipe, latents, 2.5)
    disturb(model)
    ours = our_images(model, 2.5)
    assert model.export(tmp_path, "merged") == tmp_path / "model_index.json"
    assert not any("lora" in key for f in tmp_path.rglob("*.safetensors") for key in load_file(f))
    merged = stock_images(open_stock(tmp_path), latents, 2.5)
    differ = (merged.int() - ours.int()).abs()
    assert differ.max() <= 1
    assert differ.float().mean() < 0.01
    assert (ours.int() - base.int()).abs().float().mean() > 0.5  # the adapter says something


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_merged_pipeline_in_half_precision(load: Any, tmp_path: Path, lora: bool) -> None:
    """Each weight is rounded once: the sum is taken in fp32. The VAE stays fp32."""
    settings = {} if lora else {"lora": None}
    whole, half = load("sd", **settings), load("sd", dtype="bfloat16", **settings)
    for model, folder in ((whole, "whole"), (half, "half")):
        disturb(model)
        model.export(tmp_path / folder, "merged")
    a, b = (load_file(tmp_path / n / "unet" / "diffusion_pytorch_model.safetensors") for n in ("whole", "half"))
    assert {w.dtype for w in b.values()} == {torch.bfloat16}
    assert {w.dtype for w in load_file(tmp_path / "half/text_encoder/model.safetensors").values()} == {torch.bfloat16}
    assert {w.dtype for w in load_file(tmp_path / "half/vae/diffusion_pytorch_model.safetensors").values()} == {torch.float32}
    for key, value in a.items():
        torch.testing.assert_close(b[key].float(), value, rtol=2**-7, atol=2**-7 * value.abs().max().item())
    plain = [key for key in a if "attn" not in key]
    assert all(torch.equal(b[key], a[key].bfloat16()) for key in plain)


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_an_imported_adapter_is_the_reference(
    load: Any, folder_of: Callable[[str], Path], pairs_csv: Path, tmp_path: Path, format: str
) -> None:
    """ln 2 at step 0, in training, with the rank and scale of the file; and the run's own adapter carries them on."""
    model = load("sd")
    disturb(model)
    file = adapter_file(model, tmp_path / "first", format, open_stock(folder_of("sd")))
    lines = run(folder_of("sd"), "sd", pairs_csv, tmp_path / "run", f"model.lora.path={file}", "model.lora.rank=8")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    said = json.loads(header(tmp_path / "run" / "pytorch_lora_weights.safetensors")["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (2, 4)
    trained = load("sd", lora=LoRA(path=str(tmp_path / "run")))
    before, after = steps(model), steps(trained)
    assert before.keys() == after.keys()
    assert all(0 < (after[n] - before[n]).abs().max() < 0.1 * before[n].abs().max() for n in before)


def adapter_file(model: Any, folder: Path, format: str, pipe: Any) -> Path:
    """The model's adapter in a format; PEFT's is written by PEFT."""
    if format != "peft":
        return model.export(folder, format)
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    settings = {"r": 2, "lora_alpha": 4, "target_modules": LoRA().target_modules}
    theirs = get_peft_model(pipe.unet, LoraConfig(**settings))
    set_peft_model_state_dict(theirs, {f"base_model.model.{k}": v for k, v in adapter_of(model.net)[0].items()})
    theirs.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["sd", "flux-schnell"])
def test_pefts_own_scales_are_kept(load: Any, stock: Any, tmp_path: Path, name: str, rslora: bool) -> None:
    """Ranks and alphas that differ by layer, and alpha over the root of the rank: the prediction is that of PEFT."""
    from peft import LoraConfig, get_peft_model

    pipe = stock(name)
    net_name = "transformer" if name.startswith("flux") else "unet"
    patterns = {"rank_pattern": {"to_v": 5}, "alpha_pattern": {r"attn\d?.to_q": 9}}
    settings = LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "to_v"], use_rslora=rslora, **patterns)
    theirs = get_peft_model(getattr(pipe, net_name), settings)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_B" in key:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    theirs.save_pretrained(tmp_path)
    ours = load(name, lora=LoRA(path=str(tmp_path)))
    same(our_images(ours, 2.5), stock_images(pipe, our_latents(ours), 2.5), 2.5)
    wanted = [2 * math.sqrt(5), 9 * math.sqrt(3)] if rslora else [2, 9]
    assert sorted({round(alpha, 9) for alpha in adapter_of(ours.net)[1].values()}) == pytest.approx(wanted)


def test_without_a_header_alpha_is_the_rank_as_in_stock_diffusers(load: Any, stock: Any, tmp_path: Path) -> None:
    model, pipe = load("sd"), stock("sd")
    disturb(model)
    file = rewritten(model.export(tmp_path), lambda state: state)
    ours = load("sd", lora=LoRA(path=str(file)))
    pipe.load_lora_weights(tmp_path)
    same(our_images(ours, 2.5), stock_images(pipe, our_latents(ours), 2.5), 2.5)
    assert not torch.equal(our_images(ours, 2.5), our_images(model, 2.5))  # whose scale is 2


def renamed(old: str, new: str) -> Callable[[Path], Any]:
    return lambda file: rewritten(file, lambda state: {k.replace(old, new): v for k, v in state.items()})


def only_one(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Any]:
    def change_one(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = min(k for k in state if k.endswith("lora_B.weight"))
        return state | {key: change(state[key])}

    return lambda file: rewritten(file, change_one)


BAD = {
    "no safetensors": (lambda file: file.write_text("lora"), "not a readable safetensors file"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:999]), "not a readable safetensors file"),
    "pickled": (lambda file: torch.save(read(file), file), "pickled adapters are not read"),
    "empty": (lambda file: rewritten(file, lambda state: {}, format="pt"), "it is empty"),
    "of another kind of model": (renamed("unet.", "transformer."), "is no part of the unet"),
    "of a text encoder": (renamed("unet.mid", "text_encoder.mid"), "only the unet is trained here"),
    "of other blocks": (renamed("mid_block", "mid_block_2"), "there is no layer mid_block_2"),
    "of another width": (only_one(lambda b: torch.cat([b, b])), r"is 64 x \d+ there and 32 x \d+ here"),
    "not finite": (only_one(lambda b: b * float("nan")), "is not finite"),
    "half a layer": (
        only_one(lambda b: b, "x") if False else renamed("to_q.lora_B", "to_q.lora_C"),
        "no part of a plain LoRA",
    ),
    "DoRA": (renamed("to_q.lora_B.weight", "to_q.lora_magnitude_vector"), "without DoRA"),
    "PEFT's without its settings": (renamed("unet.", "base_model.model."), "adapter_config.json, which is not beside it"),
    "kohya's with strange keys": (renamed("unet.", "lora_unet_"), "diffusers cannot read its keys"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_adapter_of_this_model_are_refused(load: Any, tmp_path: Path, case: str) -> None:
    damage, message = BAD[case]
    file = load("sd").export(tmp_path)
    damage(file)
    with pytest.raises(ModelError, match=message):
        load("sd", lora=LoRA(path=str(file)))


@pytest.mark.parametrize(("of", "into"), [("sd", "sdxl"), ("sdxl", "sd"), ("sd3", "flux-dev"), ("flux-dev", "sd3")])
def test_an_adapter_of_another_model_is_refused(load: Any, tmp_path: Path, of: str, into: str) -> None:
    load(of).export(tmp_path)
    with pytest.raises(ModelError, match="it is the adapter of another model"):
        load(into, lora=LoRA(path=str(tmp_path)))


def test_a_folder_must_hold_one_adapter(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="0 safetensors files, not one adapter"):
        load("sd", lora=LoRA(path=str(tmp_path)))
    for name in "ab":
        load("sd").export(tmp_path, "kohya").rename(tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"2 safetensors files.*name the file itself"):
        load("sd", lora=LoRA(path=str(tmp_path)))
    load("sd", lora=LoRA(path=str(tmp_path / "b.safetensors")))


# --- a run ----------------------------------------------------------------------------------------------------------


def redness(images: list[Any], prompts: list[str]) -> list[float]:
    return [image.getpixel((0, 0))[0] / 255 for image in images]


@pytest.fixture(scope="module")
def finished(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two measured runs, LoRA and full, of a base with a licence, on pairs some of which state one."""
    root = tmp_path_factory.mktemp("exports")
    base, data = Path(shutil.copytree(folder_of("sd"), root / "base")), root / "data"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-rail-1\n---\nText.\n")
    rows, pairs = [], []
    for i in range(6):
        png = encode_png(picture(i))
        stated = {"licence": "CC-BY-4.0" if i else None}
        rows.append({"image_id": str(i), "sha256": sha256(png), "image": {"bytes": png, "path": None}} | stated)
        if i % 2:
            pairs.append({"pair_id": str(i), "prompt": PROMPTS[0], "chosen_id": str(i), "rejected_id": str(i - 1)})
    write_shard(data, "images", 0, rows)
    write_shard(data, "pairs", 0, pairs)
    measured = ["evaluate.enabled=true", "evaluate.prompts=shapes:test", "evaluate.num_prompts=2", "train.save_steps=1"]
    measured += ["evaluate.sampling.num_inference_steps=1", "evaluate.scorers=[shapes, test_exports:redness]"]
    out = {"lora": root / "lora", "full": root / "full", "base": base}
    run(base, "sd", data, out["lora"], *measured, "model.lora.alpha=4")
    run(base, "sd", data, out["full"], "model.lora=null")
    return out


def python_of(card: Path) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", card.read_text(), re.S | re.M)
    return code


@pytest.mark.parametrize("format", ["diffusers", "kohya", "merged"])
def test_a_run_is_exported_and_loads_as_its_card_says(
    load: Any, finished: dict[str, Path], tmp_path: Path, format: str
) -> None:
    out = tmp_path / format
    assert cli("export", finished["lora"], out, "--format", format) == f"written: {out}\n"
    said: dict[str, Any] = {}
    exec(python_of(out / "README.md"), said)
    said["pipe"].set_progress_bar_config(disable=True)
    model = load("sd")
    model.restore(finished["lora"])
    ours, theirs = our_images(model, 2.5), stock_images(said["pipe"], our_latents(model), 2.5)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    files = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": KOHYA_FILE, "merged": "model_index.json"}
    assert (out / files[format]).is_file()
    if format != "merged":
        assert {f.name for f in out.iterdir()} == {"README.md", files[format]}
        about = header(out / files[format])
        assert about["base_model"] == str(finished["base"])
        objective = {k: v for k, v in json.loads(about["objective"]).items() if v is not None}
        assert objective == {"type": "sigmoid", "beta": 500.0, "kappa": 0.5, "weight": 1.0}
        assert re.match(r"\d+\.\d+", about["diffalign_version"])
    if format == "diffusers":
        said = {k: v for k, v in json.loads(about["lora_adapter_metadata"]).items() if v is not None}
        assert (said["unet.r"], said["unet.lora_alpha"]) == (2, 4)
        assert sorted(said["unet.target_modules"]) == ["to_k", "to_out.0", "to_q", "to_v"]


def test_exports_stand_in_the_run_if_not_told_where(finished: dict[str, Path]) -> None:
    cli("export", finished["lora"], "--format", "kohya")
    assert (finished["lora"] / "exports" / "kohya" / KOHYA_FILE).is_file()


def test_a_full_run_is_exported_whole_in_any_precision(finished: dict[str, Path], tmp_path: Path) -> None:
    cli("export", finished["full"], tmp_path / "same")
    cli("export", finished["full"], tmp_path / "half", "--format", "merged", "--dtype", "float16")
    a, b = (load_file(tmp_path / n / "unet/diffusion_pytorch_model.safetensors") for n in ("same", "half"))
    assert all(torch.equal(b[key], value.half()) for key, value in a.items())
    assert not list((tmp_path / "same").glob("checkpoint-*"))
    code = python_of(tmp_path / "same" / "README.md")
    assert f'from_pretrained("{tmp_path / "same"}")' in code
    assert "lora" not in code


def test_the_card_says_what_it_must(finished: dict[str, Path]) -> None:
    cli("report", finished["lora"])
    card = (finished["lora"] / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model" not in front  # which names a repository of the hub, and this base is a folder
    assert "license" not in front
    for row in (
        rf"\| base model \| `{finished['base']}` \| tiny-rail-1 \|",
        r"\| pairs \| `.*/data` \| CC-BY-4.0, unknown for some images \|",
        r"\| scorer \| `shapes` \| Apache-2.0 \|",
        r"\| scorer \| `test_exports:redness` \| unknown \|",
        r"\| exact \| \d\.\d{3} \| \d\.\d{3} \| [+-]",
    ):
        assert re.search(row, card), row
    assert "Win rate over the base" in card
    (config,) = re.findall(r"^```yaml\n(.*?)^```", card, re.S | re.M)
    assert config == (finished["lora"] / "config.resolved.yaml").read_text()


def test_the_card_of_a_hub_model_names_it(finished: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished["lora"], tmp_path / "run"))
    config = folder / "config.resolved.yaml"
    config.write_text(config.read_text().replace(str(finished["base"]), "someone/some-model"))
    (folder / "env.json").write_text("{}")  # of a run that noted no licences
    cli("report", folder)
    card = (folder / "README.md").read_text()
    assert "\nbase_model: someone/some-model\n" in card.split("---")[1]
    assert "| all | | unknown |" in card


def test_licences_are_read_never_guessed(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert hub.licence(str(tmp_path)) is None
    for text, stated in {
        "no front matter": None,
        "---\ntags: [a]\n---\n": None,
        "---\nlicense: openrail++\n---\n": "openrail++",
        "---\nlicense: [mit, apache-2.0]\n---\n": "mit, apache-2.0",
        "---\nlicense: other\n---\n": "other",
        "---\nlicense: [\n---\n": None,
    }.items():
        card.write_text(text)
        assert hub.licence(str(tmp_path)) == stated
    assert hub.licence("nobody/not-in-the-cache") is None
    assert hub.licence("shapes-unet") == "Apache-2.0"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "NOTHING"], "is not a finished run: it holds no trained weights"),
        (["export", "LORA", "--dtype", "float16"], "--dtype does not apply to diffusers"),
        (["export", "FULL", "--format", "kohya"], "there is no adapter"),
        (["push", "NOTHING", "me/mine"], "no metrics.json"),
    ],
)
def test_exports_that_cannot_be_are_refused(finished: dict[str, Path], tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "nothing").mkdir()
    stand_ins = {"NOTHING": str(tmp_path / "nothing"), "LORA": str(finished["lora"]), "FULL": str(finished["full"])}
    result = CliRunner().invoke(main, [stand_ins.get(a, a) for a in args])
    assert result.exit_code == 2
    assert message in result.output


# --- to the hub and from it -----------------------------------------------------------------------------------------


def test_push_uploads_the_model_and_its_card_alone(finished: dict[str, Path], fake_hub: FakeHub) -> None:
    lora, full = finished["lora"], finished["full"]
    assert {"checkpoint-2", "samples", "metrics.jsonl"} <= {p.name for p in lora.iterdir()}
    said = cli("push", lora, "me/lora", "--private")
    assert said == "uploaded: https://huggingface.co/me/lora\n"
    assert fake_hub.private is True
    assert fake_hub.files["me/lora"] == ["README.md", "pytorch_lora_weights.safetensors"]
    assert 'load_lora_weights("me/lora")' in (lora / "README.md").read_text()
    cli("push", full, "me/full")
    assert fake_hub.private is False
    folders = {name.partition("/")[0] for name in fake_hub.files["me/full"]}
    assert folders == {"README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert "unet/diffusion_pytorch_model.safetensors" in fake_hub.files["me/full"]


def test_push_without_a_login_says_how_to_get_one(finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = CliRunner().invoke(main, ["push", str(finished["lora"]), "me/mine"])
    assert (result.exit_code, result.output) == (
        2,
        "diffalign: me/mine: not logged in to the hub (log in with `hf auth login`)\n",
    )


@pytest.mark.parametrize(("name", "part"), [("not a name", "no name of a repository"), ("me/mine", "cannot upload")])
def test_push_that_is_refused_is_one_line(
    finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, part: str
) -> None:
    """By the hub's own client, which checks the name and then finds itself offline."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a login")
    result = CliRunner().invoke(main, ["push", str(finished["lora"]), name])
    assert result.exit_code
    assert part in result.output
    assert result.output.count("\n") == 1
